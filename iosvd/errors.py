"""Errors a user can cause: one line each, naming the cause and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class IosvdError(Exception):
    """Base of all errors that a user can cause; its text is one line."""


def one_line(error: BaseException) -> str:
    """Return the text of an error, also of a library's, on one line."""
    return " ".join(str(error).split())


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """End a command that a user's error stops: one line on standard error, status 2."""
    try:
        yield
    except (IosvdError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


class ConfigError(IosvdError):
    """An option is unknown, of the wrong type, or contradicts another."""


def check_at_least(least: float, **options: float) -> None:
    """Raise ConfigError for the first option below `least`."""
    for name, value in options.items():
        if not value >= least:
            raise ConfigError(f"{name}={value} is below {least:g}")


class BudgetError(IosvdError):
    """The maintenance ratio cannot be met."""


class ModelError(IosvdError):
    """A model cannot be loaded, or none of its layers is a target."""


class DataError(IosvdError):
    """A text is missing, unreadable, or too short."""


class NumericalError(IosvdError):
    """A weight, an activation, a statistic or a loss is not finite, or a factorisation failed."""


class CheckpointError(IosvdError):
    """A compressed checkpoint is incomplete, contradicts its plan, or cannot be written."""


class RecordError(IosvdError):
    """A run's record is missing or unreadable."""


class StorageError(IosvdError):
    """A file cannot be written, for instance because the disk is full."""


class WorkerError(IosvdError):
    """The process that carried out a run was killed."""
