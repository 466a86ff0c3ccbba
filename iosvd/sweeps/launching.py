"""Hand a sweep's runs to Hydra's launcher, watch them, and retry those whose worker dies.

The launcher is chosen in conf/launcher; this file schedules nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from iosvd.errors import IosvdError, RecordError, WorkerError, one_line
from iosvd.presets import conf_folder
from iosvd.runs.config import label, method_options, to_run
from iosvd.runs.execution import execute, locked, record_failure
from iosvd.runs.records import METRICS, TRACKED, check_inside, run_folder
from iosvd.runs.run import Run, TrackingMode
from iosvd.sweeps.expansion import Job
from iosvd.sweeps.gpus import COUNT_ONLY, take_gpu
from iosvd.sweeps.hydra_internals import launcher
from iosvd.sweeps.status import RunStatus, Stamps, State, status_of
from iosvd.system.commands import write_what_can_be_written
from iosvd.system.files import remove_abandoned
from iosvd.system.interrupts import end_with, raise_if_asked, shield_workers
from iosvd.system.progress import quiet_libraries

log = logging.getLogger(__name__)
_LOOK_SECONDS = 2.0
_PATIENCE_SECONDS = 0.2  # Longer than a check of the lock by another process holds it.
_LAUNCHER = "IOSVD_LAUNCHER"  # The launching process, for its workers.
_WAITING_WORKERS = "hydra_plugins.hydra_joblib_launcher"  # Its workers wait for more jobs.


def carry_out_one(composed: DictConfig) -> None:
    """Carry out one job of Hydra's launcher, in a worker process if the launcher has workers."""
    write_what_can_be_written()
    hydra_config = HydraConfig.get()
    if str(hydra_config.launcher._target_).startswith(_WAITING_WORKERS):
        parent = int(os.environ.get(_LAUNCHER, os.getpid()))
        if parent != os.getpid():
            end_with(parent)
    options = method_options(hydra_config.overrides.task)
    run = to_run(composed, label(hydra_config.runtime.choices.get("method"), options))
    if run.runtime.parallel.gpu_per_worker:
        take_gpu()
    quiet_libraries()
    execute(run)


def carry_out(jobs: Sequence[Job], overrides: Sequence[str]) -> list[RunStatus]:
    """Carry out the runs of a sweep that are not complete, and return the status of all.

    A run that another sweep carries out is waited for. If a worker dies, its run is tried once more
    alone; a run that dies again is recorded as failed, and the others go on.

    Args:
        jobs: of the sweep.
        overrides: of its command line.
    """
    runs = [job.run for job in jobs]
    for run in runs:
        _tidy(run)  # Also if it is complete.
    before, pending = Stamps.of(runs), [job for job in jobs if _has_work(job.run)]
    log.info("%d runs, %d of them complete", len(jobs), len(jobs) - len(pending))
    with watched(runs) if pending else nullcontext():
        while pending:
            _launch(pending, overrides)
            left = _left(pending, before)
            for died in (job for job in left if _state(job, before) is State.interrupted):
                _try_alone(died, overrides)
            left = [job for job in left if _state(job, before) is State.missing]
            if len(left) == len(pending):  # No run has begun: trying again would end the same way.
                _one_by_one([job for job in left if _record_of(job.run).exists()], overrides)
                break
            pending = left
    return [before.status_of(run, _PATIENCE_SECONDS) for run in runs]


def _record_of(run: Run) -> Path:
    return run_folder(run) / METRICS


def _tidy(run: Run) -> None:
    """Remove what killed writers left in a run's folder, unless another process is using it."""
    folder = run_folder(run)
    with suppress(RecordError):
        check_inside(folder, run)
        remove_abandoned(folder)


def _state(job: Job, before: Stamps) -> State:
    return before.status_of(job.run, _PATIENCE_SECONDS).state


def _left(launched: Sequence[Job], before: Stamps) -> list[Job]:
    """Wait until no process carries out these runs; return those that neither ended nor failed."""
    for job in launched:
        if _state(job, before) is State.running:
            log.info("waiting for another process, which carries out %s", run_folder(job.run))
            with locked(job.run, patience=-1):
                pass
    ended = (State.done, State.failed)
    return [job for job in launched if _state(job, before) not in ended]


def _try_alone(died: Job, overrides: Sequence[str]) -> None:
    """Retry a run whose process was killed, alone, so that it can kill no other run's worker."""
    log.warning("%s was killed with its process; tried once more", run_folder(died.run).name)
    error = _launch([died], overrides)
    if status_of(died.run, _PATIENCE_SECONDS).state is State.interrupted:
        reason = "its process was killed twice, perhaps for want of memory; launch again to go on"
        if isinstance(error, IosvdError):  # It had not begun.
            reason = str(error)
        record_failure(died.run, WorkerError(reason))


def _one_by_one(jobs: Sequence[Job], overrides: Sequence[str]) -> None:
    """Launch runs that lack only their checkpoint one by one: a dying worker must stop no other."""
    for job in jobs if len(jobs) > 1 else ():
        _launch([job], overrides)


def _has_work(run: Run) -> bool:
    if run.runtime.output.force or status_of(run).state is not State.done:
        return True
    untracked = not (run_folder(run) / TRACKED).exists()
    return run.runtime.tracking.mode is not TrackingMode.disabled and untracked


def _launch(jobs: Sequence[Job], overrides: Sequence[str]) -> Exception | None:
    """Give these runs to the launcher that the overrides choose, and wait for their end.

    Returns:
        The launcher's error, if it had one.
    """
    shield_workers()
    os.environ[_LAUNCHER] = str(os.getpid())
    if any(each.run.runtime.parallel.gpu_per_worker for each in jobs):
        os.environ[COUNT_ONLY] = "1"  # For the workers.
    try:
        with launcher(str(conf_folder()), overrides, carry_out_one) as launch:
            results = launch.launch([list(each.overrides) for each in jobs], initial_job_idx=0)
            for result in results:
                _ = result.return_value  # Raises a job's error, which is never a run's own.
    # Launchers raise their own types if a worker dies.
    except Exception as error:  # noqa: BLE001
        log.error("a worker ended: %s", one_line(error)[:300])
        return error
    finally:
        raise_if_asked()
    return None


@contextmanager
def watched(runs: Sequence[Run]) -> Iterator[None]:
    """Show the progress of a sweep: a bar on a terminal, in logs a line for each finished run."""
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(runs, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _watch(runs: Sequence[Run], stop: threading.Event) -> None:
    started, before = time.monotonic(), _done(runs)
    last, total = before, len(runs)
    with tqdm(total=total, initial=before, desc="sweep", unit="run", disable=None) as bar:
        while not stop.wait(_LOOK_SECONDS):
            done = _done(runs)
            bar.update(done - bar.n)
            # Reading a record checks it, so complete runs are not read again and again.
            others = [run for run in runs if not (run_folder(run) / METRICS).exists()]
            running = sum(status_of(run).state is State.running for run in others)
            bar.set_postfix(running=running)
            if done > last and not sys.stderr.isatty():
                left = (time.monotonic() - started) / (done - before) * (total - done)
                log.info(
                    "sweep: %d of %d runs done, %d running, about %.0f min left",
                    done,
                    total,
                    running,
                    left / 60,
                )
            last = done


def _done(runs: Sequence[Run]) -> int:
    return sum((run_folder(run) / METRICS).exists() for run in runs)
