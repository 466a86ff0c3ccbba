"""Where the runs of a sweep stand, as their folders tell it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from filelock import Timeout

from iosvd.errors import RecordError
from iosvd.execution import locked
from iosvd.records import FAILURE, read_record, run_folder
from iosvd.run import Run


class State(Enum):
    """Where a run stands."""

    done = "done"
    running = "running"
    failed = "failed"
    interrupted = "interrupted"  # Begun, and its process ended: it goes on where it was.
    missing = "missing"


@dataclass(frozen=True)
class Standing:
    """A run, where it stands, and the first line of its failure."""

    run: Run
    state: State
    folder: Path
    reason: str = ""


def standing(run: Run) -> Standing:
    """Look where a run stands."""
    folder = run_folder(run)
    try:
        if read_record(folder) is not None:
            return Standing(run, State.done, folder)
    except RecordError as error:
        return Standing(run, State.failed, folder, str(error))
    if not folder.exists():
        return Standing(run, State.missing, folder)
    try:
        with locked(run, patience=0):
            pass
    except Timeout:
        return Standing(run, State.running, folder)
    if (folder / FAILURE).exists():
        return Standing(run, State.failed, folder, _reason(folder / FAILURE))
    return Standing(run, State.interrupted, folder)


def _reason(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["error"]).splitlines()[0]
    except (OSError, ValueError, KeyError, IndexError):
        return f"{path} cannot be read"
