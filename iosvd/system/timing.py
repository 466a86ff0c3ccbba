"""Seconds and peak memory of the stages of a run."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from iosvd.system.logs import of_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """The cost of one stage. Peak memory is the GPUs' if one is in use, else the process's."""

    seconds: float
    peak_bytes: int


@dataclass
class StageClock:
    """Measures named stages, in order; entering a stage again adds to its cost."""

    stages: dict[str, Stage] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        with of_stage(name):
            with measured() as took:
                yield
            self.add(name, took())
            log.info("took %.1f s", took().seconds)

    def add(self, name: str, took: Stage) -> None:
        """Add a cost that was measured elsewhere to a stage."""
        before = self.stages.get(name, Stage(0.0, 0))
        peak = max(before.peak_bytes, took.peak_bytes)
        self.stages[name] = Stage(before.seconds + took.seconds, peak)


@contextmanager
def measured() -> Iterator[Callable[[], Stage]]:
    """Yield a function that returns the cost of the block after it ends."""
    found: list[Stage] = []
    if _on_gpu():
        torch.cuda.synchronize()  # Work that is queued is not this block's.
    _reset_peak()
    started = time.monotonic()
    yield lambda: found[0]
    if _on_gpu():
        torch.cuda.synchronize()
    found.append(Stage(time.monotonic() - started, _peak_bytes()))


def _on_gpu() -> bool:
    # Not is_available(): before a model is on a GPU its counters cannot be reset.
    return torch.cuda.is_initialized()


def _reset_peak() -> None:
    if _on_gpu():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux resets the resident high-water mark on request; elsewhere it covers the whole process.
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        try:
            clear.write_text("5")
        except OSError:
            log.debug("cannot reset the memory high-water mark; peaks cover the whole process")


def _peak_bytes() -> int:
    if _on_gpu():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
