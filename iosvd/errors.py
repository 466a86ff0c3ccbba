"""Errors a user can cause: one line each, naming the cause and the remedy."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

_LONGEST = 2000  # Characters of an error's line.
_LONGEST_NAME = 100  # Bytes; file names allow 255 and hold more than this.
_HIDDEN = ("Cc", "Cf", "Cs", "Co")  # Unicode categories that change how other characters are shown.


class IosvdError(Exception):
    """Base of all errors that a user can cause; its text is one line."""

    def __str__(self) -> str:
        return shortened(plain(super().__str__()), _LONGEST)


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line."""
    return shortened(plain(str(error)), _LONGEST)


def plain(text: str) -> str:
    """Return a text on one line, without control characters."""
    seen = "".join(" " if unicodedata.category(c) in _HIDDEN else c for c in text)
    return " ".join(seen.split())


def shortened(text: str, longest: int) -> str:
    """Cut the middle out of a text that is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    half = (longest - 3) // 2
    return f"{text[:half]} … {text[len(text) - half :]}"


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Turn a user's error into one line on standard error and exit status 2."""
    try:
        yield
    except (IosvdError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        sys.exit(2)


class MissingExtraError(IosvdError, ImportError):
    """A library of an optional part is not installed."""


@contextmanager
def extra(library: str) -> Iterator[None]:
    """Import an optional library; if it is missing, name the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise
        raise _missing(library) from None


def check_installed(libraries: Iterable[str]) -> None:
    """Raise MissingExtraError for the first of these libraries that is missing."""
    for library in libraries:
        if find_spec(library) is None:
            raise _missing(library)


_EXTRAS = {"gguf": "gguf"}  # The extras that bring a library, other than experiments.


def _missing(library: str) -> MissingExtraError:
    return MissingExtraError(
        f"{library} is not installed; install iosvd with its extra:"
        f" pip install 'iosvd[{_EXTRAS.get(library, 'experiments')}]'"
    )


class ConfigError(IosvdError):
    """An option is unknown, of the wrong type, or contradicts another."""


def check_at_least(least: float, **options: float) -> None:
    """Raise ConfigError for the first option below `least`."""
    for name, value in options.items():
        if not value >= least:
            raise ConfigError(f"{name}={value} is below {least:g}")


def check_name(option: str, name: str) -> None:
    """Raise ConfigError unless a name is a valid file name on every system."""
    bad = [c for c in '/\\:*?"<>|' if c in name]
    reason = None
    if not name.strip():
        reason = "is empty"
    elif name.startswith("."):
        reason = "begins with a dot"
    elif plain(name) != name:
        reason = "has spaces at an end, or characters that cannot be seen"
    elif bad:
        reason = f"has {bad[0]} in it"
    elif len(name.encode()) > _LONGEST_NAME:
        reason = f"is longer than {_LONGEST_NAME} bytes"
    if reason is not None:
        shown = shortened(plain(name), 60)
        raise ConfigError(f"{option}={shown} {reason}, but files are named after it; change it")


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
