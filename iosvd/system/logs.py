"""Log lines with the run and the stage that they belong to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from iosvd.system.progress import heartbeat

FORMAT = "%(asctime)s %(levelname)s %(where)s%(message)s"
_run: ContextVar[str] = ContextVar("run", default="")
_stage: ContextVar[str] = ContextVar("stage", default="")


class Where(logging.Filter):
    """Adds the run and the stage to every log record."""

    def filter(self, record: logging.LogRecord) -> bool:
        names = [name for name in (_run.get(), _stage.get()) if name]
        record.where = f"[{' | '.join(names)}] " if names else ""
        return True


@contextmanager
def of_run(name: str) -> Iterator[None]:
    """Mark the lines that are logged inside with their run."""
    token = _run.set(name)
    try:
        yield
    finally:
        _run.reset(token)


@contextmanager
def of_stage(name: str) -> Iterator[None]:
    """Mark the lines that are logged inside with their stage, of which there is one a minute."""
    token = _stage.set(name)
    try:
        with heartbeat():
            yield
    finally:
        _stage.reset(token)


def log_to_console() -> None:
    """Log to standard output in the format of Hydra's jobs (conf/config.yaml)."""
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(Where())
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
