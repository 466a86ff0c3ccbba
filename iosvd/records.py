"""A run's folder: its config, its plan, and metrics.json, whose presence means complete."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from iosvd.errors import RecordError
from iosvd.fingerprints import digest
from iosvd.plan import SitePlan
from iosvd.run import Run
from iosvd.storage import DamagedError, read_sealed

METRICS = "metrics.json"  # Written last, with a checksum.
FAILURE = "failure.json"
PLAN = "plan.json"
SPECTRA = "spectra.safetensors"  # All singular values of every site.
CHECKPOINT = "checkpoint"
TRACKED = "wandb.json"  # Where the run was logged.
ANSWERS = "answers.json"  # Which items of each zero-shot task were answered rightly.


def run_folder(run: Run) -> Path:
    """Return `<results>/runs/<model>/<label>-<ratio>-<digest>`, unique to what the run measures.

    Where the run has a target instead of a ratio, that is in its place.
    A run that exists already keeps its folder, whatever its row was called when it was made: two
    tables that name it differently share it.
    """
    folder, identity = Path(run.runtime.results) / "runs" / run.model.name, digest(run)
    if found := sorted(folder.glob(f"*-{identity}")):
        return found[0]
    label = re.sub(r"[^\w.=]+", "_", run.label).strip("_")
    goal = f"kl{run.target_kl:g}" if run.ratio is None else f"{run.ratio:g}"
    return folder / f"{label}-{goal}-{identity}"


@dataclass(frozen=True)
class Record:
    """What a complete run measured, as tables and figures need it."""

    digest: str  # Of the run that wrote it: what it measured.
    label: str
    ratio: float
    ratio_achieved: float
    target_bytes: int  # That the weights of the target layers take.
    perplexity: Mapping[str, float]  # By the name of the data set.
    accuracy: Mapping[str, float]  # `acc`, by task.
    average_acc: float | None
    extra: Mapping[str, float]  # Predictions and divergences, by the name of their column.
    spread: Mapping[str, float]  # Standard deviation by column, where it is a mean over runs.
    seconds: float  # Of the compression: statistics to replacement.
    started: str
    device: str
    model_revision: str | None
    commit: str

    def value(self, metric: str) -> float | None:
        """Return a metric by the name of its column, None if it was not measured."""
        if metric.endswith("_ppl"):
            return self.perplexity.get(metric.removesuffix("_ppl"))
        numbers = {
            "average_acc": self.average_acc,
            "ratio_achieved": self.ratio_achieved,
            "target_bytes": self.target_bytes,
            "seconds": self.seconds,
        }
        if metric in numbers:
            return numbers[metric]
        return self.accuracy.get(metric, self.extra.get(metric))


def is_complete(folder: Path) -> bool:
    """Whether the run has a record, and it can be read."""
    try:
        return read_record(folder) is not None
    except RecordError:
        return False


def read_record(folder: Path) -> Record | None:
    """Read the metrics of a run, None if it is not complete.

    Raises:
        RecordError: metrics.json is damaged.
    """
    if not (folder / METRICS).exists():
        return None
    try:
        return _record(read_metrics(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"cannot read {folder / METRICS} ({type(error).__name__}); remove it and run again"
        ) from error


def _record(metrics: Mapping[str, Any]) -> Record:
    average = metrics["average_acc"]
    # The text's name, not its key: the data set that calibrates is "own" in every run.
    names = {key: text["name"] for key, text in metrics["config"]["eval"]["texts"].items()}
    return Record(
        digest=metrics["digest"],
        label=metrics["label"],
        ratio=float(metrics["ratio"]),
        ratio_achieved=float(metrics["ratio_achieved"]),
        target_bytes=int(metrics["target_bytes"]),
        perplexity={names[key]: float(value) for key, value in metrics["perplexity"].items()},
        accuracy={name: float(task["acc"]) for name, task in metrics["zero_shot"].items()},
        average_acc=None if average is None else float(average),
        extra=dict(_extra(metrics, names)),
        spread={},
        seconds=float(metrics["compression_seconds"]),
        started=metrics["started"],
        device=metrics["device"],
        model_revision=metrics["model_revision"],
        commit=metrics["commit"],
    )


def _extra(metrics: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    for key in ("predicted_kl", "predicted_loss_change"):
        if metrics[key] is not None:
            yield key, float(metrics[key])
    for text, measured in metrics.get("divergence", {}).items():
        yield f"{names[text]}_kl", float(measured["kl"])
        yield f"{names[text]}_loss_change", float(measured["loss_change"])
    for text, sites in metrics.get("site_divergence", {}).items():
        # A truncation that changes nothing at all was predicted neither well nor badly.
        measured = [s for s in sites.values() if s["kl"] > 0 and s["predicted_kl"] is not None]
        if ratios := [site["predicted_kl"] / site["kl"] for site in measured]:
            yield f"{names[text]}_site_median", statistics.median(ratios)
            within = [0.5 <= ratio <= 2 for ratio in ratios]
            yield f"{names[text]}_sites_within_two", sum(within) / len(within)


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return all that a complete run measured, as it was written.

    Raises:
        RecordError: it cannot be read.
    """
    path = folder / METRICS
    try:
        return read_sealed(path)
    except DamagedError as error:
        raise RecordError(f"cannot read {path}: {error}; remove it and run again") from error
    except OSError as error:
        raise RecordError(f"cannot read {path}; remove it and run again") from error


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the plan of a complete run.

    Raises:
        RecordError: it is absent, damaged or of another version.
    """
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        for site in plan["sites"].values():
            SitePlan(**site)  # As this version writes it.
        return dict(plan)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(
            f"cannot read the plan in {folder} ({error}); remove it and run again"
        ) from error


def read_plan_and_spectra(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the plan of a complete run, and all singular values of every site.

    Raises:
        RecordError: one of them is absent or damaged.
    """
    plan = read_plan(folder)
    try:
        return plan, load_file(folder / SPECTRA)
    except (OSError, SafetensorError) as error:
        raise RecordError(
            f"cannot read the spectra in {folder} ({error}); remove it and run again"
        ) from error
