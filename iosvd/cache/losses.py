"""Calibration losses under truncated weights, each measured once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from iosvd.cache.keys import SpectrumKeys
from iosvd.cache.store import Store, get_or_compute
from iosvd.system.timing import Stage


@dataclass(frozen=True)
class CachedLosses:
    """Losses by ranks; any run with the same spectra shares them."""

    store: Store
    keys: SpectrumKeys
    elsewhere: list[Stage] = field(default_factory=list)  # Costs of losses that were cached.

    def of(self, ranks: Mapping[str, int], windows: int, measure: Callable[[], float]) -> float:
        """Return the loss with these ranks on the first windows; measure it if missing."""
        entry, now = get_or_compute(
            self.store,
            self.keys.loss(ranks, windows),
            self.keys.losses(),
            lambda: {"loss": torch.tensor(measure(), dtype=torch.float64)},
        )
        if not now:
            self.elsewhere.append(entry.cost)
        return float(entry.tensors["loss"])
