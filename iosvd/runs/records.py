"""A run's folder: config, plan, and metrics.json, whose presence means that it is complete."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from iosvd.errors import RecordError, one_line, plain, shortened
from iosvd.metric import AVERAGE, Metric, accuracy_on, other, perplexity_on
from iosvd.models.gguf import GgufFile
from iosvd.runs.fingerprints import digest
from iosvd.runs.metrics import Failure, Metrics, SitePlans
from iosvd.runs.run import Run
from iosvd.system.json_files import DamagedError, read_json, read_sealed, typed

METRICS = "metrics.json"  # Written last, with a checksum.
KEPT = "records"  # Of the results: folders with a metrics.json each.
FAILURE = "failure.json"
PLAN = "plan.json"
SPECTRA = "spectra.safetensors"  # All singular values of every site.
CHECKPOINT = "checkpoint"
TRACKED = "wandb.json"  # Identifies the run in wandb.
ANSWERS = "answers.json"  # Correct answers, item by item, for each zero-shot task.
_LONGEST_LABEL = 100  # Characters of a folder's name; the digest makes it unique.


def run_folder(run: Run) -> Path:
    """Return `<results>/runs/<model>/<label>-<ratio>-<digest>`, unique to what the run measures.

    A run with a target_kl has that in place of the ratio. An existing run keeps its folder whatever
    its label: two tables that name it differently share it.
    """
    folder, identity = Path(run.runtime.output.results) / "runs" / run.model.name, digest(run)
    if found := sorted(folder.glob(f"*-{identity}")):
        return found[0]
    label = re.sub(r"[^\w.=]+", "_", run.label).strip("_")[:_LONGEST_LABEL]
    goal = f"kl{run.goal.target_kl:g}" if run.goal.ratio is None else f"{run.goal.ratio:g}"
    return folder / f"{label}-{goal}-{identity}"


def record_folder(run: Run) -> Path:
    """Return the folder that holds a run's record: its own, else that of a record kept in git.

    `make keep` puts the records of complete runs into `<results>/records`, so that a table can be
    measured in parts. Only tables read them: a sweep measures what is not in a folder of its own.
    """
    own = run_folder(run)
    if (own / METRICS).exists():
        return own
    kept = Path(run.runtime.output.results) / KEPT / run.model.name
    found = sorted(kept.glob(f"*-{digest(run)}"))
    return found[0] if found else own


def is_kept(folder: Path) -> bool:
    """Whether a folder of `record_folder` is one in git, not a run's own."""
    return folder.parent.parent.name == KEPT


def check_inside(folder: Path, run: Run) -> None:
    """Raise RecordError if the folder is a link out of the results."""
    runs = (Path(run.runtime.output.results) / "runs").resolve()
    if not folder.resolve().is_relative_to(runs):
        raise RecordError(
            f"{folder} is a link out of the results, to {folder.resolve()}; nothing is written"
            " there: remove the link"
        )


@dataclass(frozen=True)
class Record:
    """The results of a complete run, as tables and figures need them."""

    digest: str  # Identity of the run that wrote it.
    label: str
    ratio: float
    ratio_achieved: float
    target_bytes: int  # Of the weights of the target layers.
    values: Mapping[Metric, float]  # Perplexities, accuracies, predictions and divergences.
    spread: Mapping[Metric, float]  # Standard deviations, if the record is a mean over runs.
    seconds: float  # Of the compression: statistics to replacement.
    started: str
    device: str
    model_revision: str | None
    model_file: str | None  # Name, number format and checksum of a GGUF file.
    commit: str

    def value(self, metric: Metric) -> float | None:
        """Return the value of a metric, None if it was not measured."""
        sizes = {
            other("ratio_achieved"): self.ratio_achieved,
            other("target_bytes"): self.target_bytes,
            other("seconds"): self.seconds,
        }
        return sizes.get(metric, self.values.get(metric))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder holds its compressed model."""
    return (folder / CHECKPOINT / "config.json").is_file()


def read_record(folder: Path) -> Record | None:
    """Read the metrics of a run, None if it is not complete.

    Raises:
        RecordError: metrics.json is damaged or belongs to another run.
    """
    try:
        there = (folder / METRICS).exists()
    except OSError as error:  # This user may not enter the folder.
        raise _unreadable(folder / METRICS, error) from error
    return record_of(read_both(folder)[1]) if there else None


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return the whole metrics.json of a complete run.

    Raises:
        RecordError: it cannot be read, or a field that readers need has another type.
    """
    return read_both(folder)[0]


def read_both(folder: Path) -> tuple[dict[str, Any], Metrics]:
    """Return the whole metrics.json of a complete run, and its typed fields.

    Raises:
        RecordError: as `read_metrics`.
    """
    path = folder / METRICS
    try:
        written = read_sealed(path)
        return written, typed(Metrics, written, METRICS)
    except (OSError, DamagedError) as error:
        raise _unreadable(path, error) from error


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the whole plan.json of a complete run.

    Raises:
        RecordError: it is absent, damaged or of another version.
    """
    path = folder / PLAN
    try:
        plan = read_json(path)
        typed(SitePlans, plan, PLAN)
        return plan
    except (OSError, DamagedError) as error:
        raise _unreadable(path, error) from error


def read_failure(folder: Path) -> str | None:
    """Return the first line of a failed run's error, or None."""
    path = folder / FAILURE
    try:
        lines = typed(Failure, read_json(path), FAILURE).error.splitlines()
        return shortened(plain(lines[0] if lines else "no reason was recorded"), 300)
    except FileNotFoundError:
        return None
    except (OSError, DamagedError) as error:
        return f"cannot read {path}: {_cause(error)}; run it again"


def _file_line(file: GgufFile | None) -> str | None:
    if file is None:
        return None
    return plain(f"{file.name} ({file.quantization}, sha256 {file.sha256[:12]}…)")


def _unreadable(path: Path, error: Exception) -> RecordError:
    return RecordError(f"cannot read {path}: {_cause(error)}; remove it and run again")


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def record_of(metrics: Metrics) -> Record:
    """Convert metrics.json to a record."""
    # The text's name, not its key: the calibration data set's key is always "own".
    names = {key: text.name for key, text in metrics.config.eval.texts.items()}
    return Record(
        digest=metrics.digest,
        label=plain(metrics.label),
        ratio=metrics.ratio,
        ratio_achieved=metrics.ratio_achieved,
        target_bytes=metrics.target_bytes,
        values=dict(_values(metrics, names)),
        spread={},
        seconds=metrics.compression_seconds,
        started=plain(metrics.started),
        device=plain(metrics.device),
        model_file=_file_line(metrics.model_file),
        model_revision=None if metrics.model_revision is None else plain(metrics.model_revision),
        commit=plain(metrics.commit),
    )


def _values(metrics: Metrics, names: Mapping[str, str]) -> Iterator[tuple[Metric, float]]:
    for text, value in metrics.perplexity.items():
        yield perplexity_on(names[text]), value
    for task, score in metrics.zero_shot.items():
        yield accuracy_on(task), score.acc
    asked = {key: named.name for key, named in metrics.config.eval.questions.items()}
    for key, found in metrics.questions.items():
        yield accuracy_on(asked[key]), found.acc
        yield accuracy_on(f"{asked[key]}_likeliest"), found.acc_likeliest
        yield other(f"{asked[key]}_unanswered"), found.unanswered
    for name, share in (("cache_ratio", metrics.cache_ratio), ("whole_ratio", metrics.whole_ratio)):
        if share is not None:
            yield other(name), share
    if metrics.average_acc is not None:
        yield AVERAGE, metrics.average_acc
    if metrics.predicted_kl is not None:
        yield other("predicted_kl"), metrics.predicted_kl
    if metrics.predicted_loss_change is not None:
        yield other("predicted_loss_change"), metrics.predicted_loss_change
    for text, measured in metrics.divergence.items():
        yield other(f"{names[text]}_kl"), measured.kl
        yield other(f"{names[text]}_loss_change"), measured.loss_change
    for text, sites in metrics.site_divergence.items():
        # Without a measured change there is nothing to predict.
        predicted = [(s.predicted_kl, s.kl) for s in sites.values() if s.kl > 0]
        if ratios := [guess / kl for guess, kl in predicted if guess is not None]:
            yield other(f"{names[text]}_site_median"), statistics.median(ratios)
            within = [0.5 <= ratio <= 2 for ratio in ratios]
            yield other(f"{names[text]}_sites_within_two"), sum(within) / len(within)


def read_plan_and_spectra(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the plan of a complete run and all singular values of every site.

    Raises:
        RecordError: one of them is absent or damaged.
    """
    plan = read_plan(folder)
    try:
        sigma = load_file(folder / SPECTRA)
    except (OSError, SafetensorError) as error:
        raise RecordError(
            f"cannot read the spectra in {folder} ({one_line(error)}); remove it and run again"
        ) from error
    for name, values in sigma.items():
        if values.ndim != 1 or not values.is_floating_point() or not values.isfinite().all():
            raise RecordError(
                f"the spectrum of {name} in {folder} is not a list of finite numbers;"
                " remove the folder and run again"
            )
    return plan, sigma
