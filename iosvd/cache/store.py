"""Where what was computed is kept: what a store does, and the one that keeps nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from iosvd.system.timing import Stage, measured

KINDS = ("scores", "spectra", "statistics", "tokens", "trials")


@dataclass(frozen=True)
class Key:
    """What an entry is: its kind, and all that its value depends on, as JSON."""

    kind: str  # One of KINDS.
    identity: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """A hash of all of it."""
        text = json.dumps([self.kind, self.identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """A value that was computed, and what that took."""

    tensors: Mapping[str, Tensor]
    cost: Stage
    numbers: Mapping[str, float | None] = field(default_factory=dict)  # What is no tensor of it.


class Store(Protocol):
    """What may keep entries for later, and for other processes."""

    @property
    def keeps(self) -> bool:
        """Whether an entry can be had again; if not, only what is needed next should be made."""
        ...

    def get(self, key: Key) -> Entry | None:
        """Return an entry, None if there is none."""
        ...

    def put(self, key: Key, entry: Entry) -> Entry:
        """Keep an entry, and return it as `get` would. Its key must be locked by this process."""
        ...

    def locked(self, keys: Iterable[Key]) -> AbstractContextManager[None]:
        """Let no other process compute what these keys name, or what is named after them."""
        ...


def get_or_compute(
    store: Store, key: Key, lock: Key, compute: Callable[[], Mapping[str, Tensor]]
) -> tuple[Entry, bool]:
    """Return an entry, and whether it was computed now.

    Args:
        store: where it is kept.
        key: of the entry.
        lock: the key that is locked while it is computed.
        compute: what returns its tensors.
    """
    if (entry := store.get(key)) is not None:
        return entry, False
    with store.locked([lock]):
        if (entry := store.get(key)) is not None:  # Somebody else has computed it meanwhile.
            return entry, False
        with measured() as took:
            tensors = compute()
        return store.put(key, Entry(tensors, took())), True


class NoStore(Store):
    """Keeps nothing: what is put is in the memory of whoever put it."""

    @property
    def keeps(self) -> bool:
        return False

    def get(self, key: Key) -> Entry | None:
        return None

    def put(self, key: Key, entry: Entry) -> Entry:
        return entry

    def locked(self, keys: Iterable[Key]) -> AbstractContextManager[None]:
        return nullcontext()
