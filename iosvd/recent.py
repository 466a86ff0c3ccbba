"""What the last run computed, for the next one to use if it differs only in what comes after."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from iosvd.pipeline import Factorized

log = logging.getLogger(__name__)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Tokens:
    """What a run reads."""

    calibration: Tensor  # (windows, length)
    texts: dict[str, Tensor]  # (windows, length) of each evaluation text


@dataclass
class Latest(Generic[Value]):
    """One value in main memory, and of what it is."""

    what: str
    _identity: str | None = None
    _value: Value | None = None

    def has(self, identity: str) -> bool:
        """Whether the value is of this."""
        return self._identity == identity

    def of(self, identity: str, compute: Callable[[], Value]) -> Value:
        """Return the value of this; only if it is of something else is it computed."""
        if self._value is not None and self.has(identity):
            log.info("%s: those of the run before", self.what)
            return self._value
        self._identity = self._value = None  # Not two of them in memory.
        self._value = compute()
        self._identity = identity
        return self._value


@dataclass(frozen=True)
class Recent:
    """What consecutive runs of a sweep share."""

    tokens: Latest[Tokens] = field(default_factory=lambda: Latest("tokens"))
    spectra: Latest[Factorized] = field(default_factory=lambda: Latest("statistics and spectra"))
