"""Where the runs of a sweep stand, as their folders tell it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from filelock import Timeout

from iosvd.errors import RecordError
from iosvd.runs.execution import locked
from iosvd.runs.records import check_inside, has_checkpoint, read_failure, read_record, run_folder
from iosvd.runs.run import Run


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
    """Look where a run stands. It is done when all that is asked of it is there."""
    folder = run_folder(run)
    try:
        check_inside(folder, run)
        complete = read_record(folder) is not None
    except RecordError as error:
        return Standing(run, State.failed, folder, str(error))
    if complete and (has_checkpoint(folder) or not run.runtime.save_checkpoint):
        return Standing(run, State.done, folder)
    if not folder.exists():
        return Standing(run, State.missing, folder)
    try:
        with locked(run, patience=0):
            pass
    except Timeout:
        return Standing(run, State.running, folder)
    if (reason := read_failure(folder)) is not None:
        return Standing(run, State.failed, folder, reason)
    if complete:
        return Standing(run, State.missing, folder, "complete, but for its checkpoint")
    return Standing(run, State.interrupted, folder)
