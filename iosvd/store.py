"""Where what was computed is kept: what a store does, and the one that keeps nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from iosvd.stages import Stage


@dataclass(frozen=True)
class Key:
    """What an entry is: its kind, and all that its value depends on, as JSON."""

    kind: str
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
