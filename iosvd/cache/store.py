"""The contract of a store of computed values, and a store that keeps nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from iosvd.system.timing import Stage, measured

KINDS = ("blocks", "scores", "spectra", "statistics", "tokens", "trainings", "trials")


@dataclass(frozen=True)
class Key:
    """Names an entry: its kind, and everything its value depends on, as JSON."""

    kind: str  # One of KINDS.
    identity: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """A hash of kind and identity."""
        text = json.dumps([self.kind, self.identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """A computed value and its cost."""

    tensors: Mapping[str, Tensor]
    cost: Stage
    numbers: Mapping[str, float | None] = field(default_factory=dict)  # Besides the tensors.


class Store(Protocol):
    """Keeps entries for later runs and other processes."""

    @property
    def keeps(self) -> bool:
        """Whether entries can be read again; if not, callers compute only what they need next."""
        ...

    def get(self, key: Key) -> Entry | None:
        """Return an entry, or None."""
        ...

    def put(self, key: Key, entry: Entry) -> Entry:
        """Store an entry and return it as `get` would. This process must hold the key's lock."""
        ...

    def drop(self, key: Key) -> None:
        """Remove an entry, if there is one."""
        ...

    def locked(self, keys: Iterable[Key]) -> AbstractContextManager[None]:
        """Keep other processes from computing the entries of these keys."""
        ...


def get_or_compute(
    store: Store,
    key: Key,
    lock: Key,
    compute: Callable[[], Mapping[str, Tensor]],
    earlier: Callable[[], float] = lambda: 0.0,
) -> tuple[Entry, bool]:
    """Return an entry, and whether this call computed it.

    Args:
        store: holds the entry.
        key: of the entry.
        lock: the key to lock during the computation.
        compute: returns the tensors of a missing entry.
        earlier: asked afterwards for the seconds that an interrupted computation had spent before
            this one resumed it; they are part of the cost.
    """
    if (entry := store.get(key)) is not None:
        return entry, False
    with store.locked([lock]):
        if (entry := store.get(key)) is not None:  # Another process has computed it meanwhile.
            return entry, False
        with measured() as took:
            tensors = compute()
        cost = replace(took(), seconds=took().seconds + earlier())
        return store.put(key, Entry(tensors, cost)), True


class NoStore(Store):
    """Keeps nothing: entries live only in the memory of the caller."""

    @property
    def keeps(self) -> bool:
        return False

    def get(self, key: Key) -> Entry | None:
        return None

    def put(self, key: Key, entry: Entry) -> Entry:
        return entry

    def drop(self, key: Key) -> None:
        return

    def locked(self, keys: Iterable[Key]) -> AbstractContextManager[None]:
        return nullcontext()
