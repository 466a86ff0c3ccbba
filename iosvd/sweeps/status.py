"""The status of the runs of a sweep, read from their folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from filelock import Timeout

from iosvd.errors import RecordError, StorageError, one_line
from iosvd.runs.execution import locked
from iosvd.runs.records import (
    METRICS,
    check_inside,
    has_checkpoint,
    read_failure,
    read_record,
    run_folder,
)
from iosvd.runs.run import Run


class State(Enum):
    """States of a run."""

    done = "done"
    running = "running"
    failed = "failed"
    interrupted = "interrupted"  # Its process ended too early; the next launch resumes it.
    missing = "missing"


@dataclass(frozen=True)
class RunStatus:
    """A run, its state, and the first line of its failure."""

    run: Run
    state: State
    folder: Path
    reason: str = ""


@dataclass(frozen=True)
class Stamps:
    """The times at which the records of some runs were written, before the runs are launched."""

    times: Mapping[Path, int | None]

    @classmethod
    def of(cls, runs: Iterable[Run]) -> Stamps:
        """Remember the runs as they are now."""
        return cls({folder: _written(folder) for folder in map(run_folder, runs)})

    def status_of(self, run: Run, patience: float = 0.0) -> RunStatus:
        """Return the status of a run; a forced run is done only after it was measured again."""
        found = status_of(run, patience)
        again = run.runtime.output.force and found.state is State.done
        if not again or _written(found.folder) != self.times.get(found.folder):
            return found
        if (reason := read_failure(found.folder)) is not None:
            return replace(found, state=State.failed, reason=reason)
        return replace(found, state=State.missing, reason="not measured again")


def _written(folder: Path) -> int | None:
    try:
        return (folder / METRICS).stat().st_mtime_ns
    except OSError:
        return None


def status_of(run: Run, patience: float = 0.0) -> RunStatus:
    """Return the status of a run. It is done when everything asked of it exists.

    Args:
        run: the run.
        patience: seconds to wait for its lock, which other processes hold for a moment to look.
    """
    folder = run_folder(run)
    try:
        check_inside(folder, run)
        complete = read_record(folder) is not None
    except RecordError as error:
        return RunStatus(run, State.failed, folder, str(error))
    if complete and (has_checkpoint(folder) or not run.runtime.output.save_checkpoint):
        return RunStatus(run, State.done, folder)
    if not folder.exists():
        return RunStatus(run, State.missing, folder)
    try:
        with locked(run, patience=patience):
            pass
    except Timeout:
        return RunStatus(run, State.running, folder)
    except (StorageError, OSError) as error:
        return RunStatus(run, State.failed, folder, one_line(error))
    if (reason := read_failure(folder)) is not None:
        return RunStatus(run, State.failed, folder, reason)
    if complete:
        return RunStatus(run, State.missing, folder, "complete, but for its checkpoint")
    return RunStatus(run, State.interrupted, folder)
