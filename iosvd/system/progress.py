"""Progress of long work: bars on a terminal, and lines in a log where no terminal shows bars.

Work that is done item by item says when it begins, then once a minute how much is done and how long
the rest of it will take. A stage without items says once a minute that it is still at work.
"""

from __future__ import annotations

import contextvars
import io
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
Item = TypeVar("Item")
BEAT_SECONDS = 55.0  # Between two lines of a stage; a minute at most, also under load.


@dataclass
class Loop:
    """Work on a known number of items."""

    what: str
    unit: str
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, items: int = 1) -> None:
        """Count items that are done."""
        self.done += items

    def line(self) -> str:
        """Return the share done and the time left."""
        spent = time.monotonic() - self.started
        place = f"{self.what}: {self.unit} {min(self.done + 1, self.total)} of {self.total}"
        if self.done == 0:
            return f"{place}, {duration(spent)} so far"
        left = duration(spent / self.done * max(0, self.total - self.done))
        return f"{place}, {self.done / self.total:.0%} done, about {left} left"


_loops: list[Loop] = []  # Nested; only the outermost one is reported.
_stages: list[object] = []  # Nested; only the innermost one reports.


def track(items: Iterable[Item], total: int, what: str, unit: str) -> Iterator[Item]:
    """Yield the items, with a bar on a terminal's standard error, or lines in the log."""
    with counted(total, what, unit) as loop:
        # disable=None: off when standard error is not a terminal.
        for item in tqdm(items, total=total, desc=what, unit=unit, disable=None, leave=False):
            yield item
            loop.advance()


@contextmanager
def counted(total: int, what: str, unit: str) -> Iterator[Loop]:
    """Report work whose items are counted by the caller."""
    loop = Loop(what, unit, total)
    _loops.append(loop)
    if len(_loops) == 1 and not sys.stderr.isatty():
        log.info("%s: %d × %s", what, total, unit)
    try:
        yield loop
    finally:
        _loops.remove(loop)


@contextmanager
def heartbeat() -> Iterator[None]:
    """Write a line a minute about the work inside, unless a terminal shows bars."""
    if sys.stderr.isatty():
        yield
        return
    ended, stage, started = threading.Event(), object(), time.monotonic()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            if _stages[-1:] == [stage]:
                spent = duration(time.monotonic() - started)
                outermost = _loops[:1]
                log.info("%s", outermost[0].line() if outermost else f"at work, {spent} so far")

    # In a copy of the context, which names the run and the stage in every line.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(beat,), name="heartbeat", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # No thread is to be had; the work goes on without.
        yield
        return
    _stages.append(stage)
    try:
        yield
    finally:
        _stages.remove(stage)
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """Return seconds in words: 42 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def quiet_libraries() -> None:
    """Turn transformers' bars off unless standard error is a terminal."""
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()


@contextmanager
def bars_for_people() -> Iterator[None]:
    """Keep the bars of libraries, which do not check where they write, out of logs and files."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield
