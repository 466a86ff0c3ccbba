"""Carry out one run: once, by one process, with nothing lost by a crash."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import Timeout
from omegaconf import OmegaConf

from iosvd.errors import IosvdError, one_line
from iosvd.runs.config import config_of
from iosvd.runs.fingerprints import digest
from iosvd.runs.measurement import measure, save_checkpoint_of
from iosvd.runs.partial_results import PARTS
from iosvd.runs.records import (
    CHECKPOINT,
    FAILURE,
    METRICS,
    TRACKED,
    check_inside,
    has_checkpoint,
    read_record,
    run_folder,
)
from iosvd.runs.run import Run
from iosvd.runs.steps import device_for
from iosvd.runs.tracking import tracked
from iosvd.system.files import (
    own_folder,
    process_lock,
    remove,
    remove_partial,
    write_failures_explained,
    written_whole,
)
from iosvd.system.json_files import write_json, write_sealed
from iosvd.system.logs import of_run
from iosvd.system.machine import out_of_memory, release_memory
from iosvd.system.progress import heartbeat

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_PATIENCE_SECONDS = 2.0  # Longer than a check of the lock by another process holds it.


class Outcome(Enum):
    """How a run ended."""

    complete = "complete"
    skipped = "skipped"
    failed = "failed"
    elsewhere = "elsewhere"  # Another process carries it out.


def execute(run: Run) -> Outcome:
    """Carry out a run unless it is complete; a failure is recorded, never raised.

    `metrics.json` is written last. A failure leaves `failure.json` with the traceback, and is
    tried again on the next launch.
    """
    folder = run_folder(run)
    if run.runtime.parallel.threads is not None:
        torch.set_num_threads(run.runtime.parallel.threads)
    try:
        with of_run(folder.name.rpartition("-")[0]), heartbeat(), locked(run):
            outcome = _execute(run)
    except Timeout:
        log.info("another process carries out %s", folder)
        return Outcome.elsewhere
    # No failure of one run may end a sweep of two hundred.
    except Exception as error:  # noqa: BLE001
        record_failure(run, error)
        outcome = Outcome.failed
    if outcome is not Outcome.skipped:  # A run that is skipped has loaded nothing.
        release_memory()
    return outcome


@contextmanager
def locked(run: Run, patience: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """Keep other processes from carrying out the run.

    Raises:
        Timeout: another process carries it out.
    """
    folder = own_folder(Path(run.runtime.output.results) / "runs", ".locks")
    lock = process_lock(folder / f"{digest(run)}.lock", timeout=patience)
    with write_failures_explained(folder):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _execute(run: Run) -> Outcome:
    folder = run_folder(run)
    check_inside(folder, run)
    if not run.runtime.output.force and read_record(folder) is not None:
        return _complete_already(run, folder)
    log.info("begins: %s", folder)
    with write_failures_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    stale = (METRICS, FAILURE, TRACKED, *([PARTS] if run.runtime.output.force else []))
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    remove(folder / CHECKPOINT)  # Of the measurement that this one replaces.
    with written_whole(folder / "config.yaml") as temporary:
        OmegaConf.save(OmegaConf.create(config_of(run)), temporary)
    with tracked(run, folder):
        measured, retried = _with_less_memory(run, partial(measure, folder=folder))
        if retried is not None:
            measured["out_of_memory"] = retried
        write_sealed(folder / METRICS, measured)
        (folder / PARTS).unlink(missing_ok=True)
    log.info("complete: %s", folder)
    return Outcome.complete


def _complete_already(run: Run, folder: Path) -> Outcome:
    """Add what a complete run lacks: a checkpoint, or its entry in wandb."""
    log.info("complete already: %s", folder)
    remove_partial(folder)
    without = run.runtime.output.save_checkpoint and not has_checkpoint(folder)
    if without:
        log.info("its checkpoint is made now; nothing is measured again")
        (folder / FAILURE).unlink(missing_ok=True)
        _with_less_memory(run, partial(save_checkpoint_of, folder=folder))
        log.info("checkpoint: %s", folder)
    if not (folder / TRACKED).exists():
        with tracked(run, folder):  # It was measured without tracking.
            pass
    return Outcome.complete if without else Outcome.skipped


def _with_less_memory(
    run: Run, work: Callable[[Run], Result]
) -> tuple[Result, dict[str, Any] | None]:
    """Return the result of the work; if memory runs out, try once more with half the batch.

    Returns:
        The result, and a description of the retry, if there was one.
    """
    try:
        return work(run), None
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        reason = one_line(error)[:300]
    # Outside the handler: its traceback keeps everything that was allocated alive.
    release_memory()
    again = with_half_the_batch(run)
    smaller = again.runtime.resources
    log.warning(
        "out of memory; tried once more with batches of %d tokens and %d requests%s",
        smaller.batch_tokens,
        smaller.batch_requests,
        ", decoder blocks in main memory" if smaller.blocks_on_cpu else "",
    )
    retried = {
        "error": reason,
        "batch_tokens": smaller.batch_tokens,
        "batch_requests": smaller.batch_requests,
        "checkpoint_blocks": smaller.checkpoint_blocks,
        "blocks_on_cpu": smaller.blocks_on_cpu,
    }
    return work(again), retried


def with_half_the_batch(run: Run) -> Run:
    """Return a run with half the batch.

    With a single window the decoder blocks move to main memory, if the method works there, and
    adapters are trained with the activations of one block at a time.
    """
    resources, length = run.runtime.resources, max(run.data.calibration.seq_len, run.eval.seq_len)
    whole = resources.batch_tokens // length <= 1
    can_visit = (
        run.method.correction.works_on_visits
        and resources.device_map is None
        and device_for(resources.device) != "cpu"
    )
    smaller = replace(
        resources,
        batch_tokens=max(1, resources.batch_tokens // 2),
        batch_requests=max(1, resources.batch_requests // 2),
        checkpoint_blocks=resources.checkpoint_blocks or whole,
        blocks_on_cpu=resources.blocks_on_cpu or (whole and can_visit),
    )
    return replace(run, runtime=replace(run.runtime, resources=smaller))


def record_failure(run: Run, error: Exception) -> None:
    """Leave the reason and the traceback in the run's folder, and say so."""
    folder, known = run_folder(run), isinstance(error, IosvdError)
    line = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
    if not known and out_of_memory(error):
        line = (
            f"out of memory ({line}); lower runtime.batch_tokens, runtime.memory_gib or"
            " runtime.workers, or raise the limit of the process (ulimit -v)"
        )
    try:
        check_inside(folder, run)
        folder.mkdir(parents=True, exist_ok=True)
        trace = traceback.format_exception(error)
        write_json(folder / FAILURE, {"error": line, "traceback": "".join(trace)})
        where = "" if known else f" (traceback in {folder / FAILURE})"
    except (OSError, IosvdError) as second:
        reason = one_line(second)
        where = "" if reason == line else f" (and failure.json could not be written: {reason})"
    log.error("failed: %s%s", line, where)
