"""Losses of trials, measured once for all who try the same ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from iosvd.cache.keys import Keys
from iosvd.cache.store import Store, get_or_compute
from iosvd.statistics.needs import Needs
from iosvd.system.timing import Stage


@dataclass(frozen=True)
class KeptLosses:
    """Losses that were measured before, by anyone who tried the same ranks of the same spectra."""

    store: Store
    keys: Keys
    needs: Needs  # The whitening's.
    elsewhere: list[Stage] = field(default_factory=list)  # What those took that were there already.

    def of(self, ranks: Mapping[str, int], windows: int, measure: Callable[[], float]) -> float:
        """Return the loss with these ranks on the first so many windows; if need be, measure it."""
        key = self.keys.trial(self.needs, ranks, windows)
        entry, now = get_or_compute(
            self.store,
            key,
            self.keys.trials(self.needs),
            lambda: {"loss": torch.tensor(measure(), dtype=torch.float64)},
        )
        if not now:
            self.elsewhere.append(entry.cost)
        return float(entry.tensors["loss"])
