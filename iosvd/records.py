"""A run's folder: its config, its plan, and metrics.json, whose presence means complete."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosvd.errors import RecordError
from iosvd.fingerprints import digest
from iosvd.run import Run

METRICS = "metrics.json"  # Written last.
FAILURE = "failure.json"
PLAN = "plan.json"
SPECTRA = "spectra.safetensors"  # All singular values of every site.
CHECKPOINT = "checkpoint"
TRACKED = "wandb.json"  # Where the run was logged.
ANSWERS = "answers.json"  # Which items of each zero-shot task were answered rightly.


def run_folder(run: Run) -> Path:
    """Return `<results>/runs/<model>/<label>-<ratio>-<digest>`, unique to what the run measures.

    A run that exists already keeps its folder, whatever its row was called when it was made: two
    tables that name it differently share it.
    """
    folder, identity = Path(run.runtime.results) / "runs" / run.model.name, digest(run)
    if found := sorted(folder.glob(f"*-{identity}")):
        return found[0]
    label = re.sub(r"[^\w.=]+", "_", run.label).strip("_")
    return folder / f"{label}-{run.ratio:g}-{identity}"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, all of it or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as stream:
        temporary = Path(stream.name)
        try:
            json.dump(value, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.chmod(0o644)  # Temporary files are private to the user.
    temporary.replace(path)


@dataclass(frozen=True)
class Record:
    """What a complete run measured, as tables need it."""

    label: str
    ratio: float
    ratio_achieved: float
    perplexity: Mapping[str, float]
    seconds: float  # Of the compression: statistics to replacement.
    commit: str


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
    path = folder / METRICS
    if not path.exists():
        return None
    try:
        metrics = json.loads(path.read_text())
        return Record(
            label=metrics["label"],
            ratio=float(metrics["ratio"]),
            ratio_achieved=float(metrics["ratio_achieved"]),
            perplexity={name: float(value) for name, value in metrics["perplexity"].items()},
            seconds=float(metrics["compression_seconds"]),
            commit=metrics["commit"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"cannot read {path} ({type(error).__name__}); remove it and run again"
        ) from error
