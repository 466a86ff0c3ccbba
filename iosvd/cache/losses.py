"""Calibration losses and divergences under truncated weights, each measured once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from iosvd.allocation.objective import Predictions
from iosvd.cache.keys import SpectrumKeys
from iosvd.cache.store import Store, get_or_compute
from iosvd.system.timing import Stage


@dataclass(frozen=True)
class CachedLosses:
    """Measurements by ranks; any run with the same spectra shares them."""

    store: Store
    keys: SpectrumKeys
    elsewhere: list[Stage] = field(default_factory=list)  # Costs of losses that were cached.

    def of(
        self,
        ranks: Mapping[str, int],
        windows: int,
        measure: Callable[[], float],
        predictions: Predictions | None = None,
    ) -> float:
        """Return what was measured with these ranks on the first windows; measure it if missing.

        Args:
            ranks: of the factorised sites.
            windows: how many.
            measure: returns the loss, or the divergence.
            predictions: that the divergence compares; None for the loss.
        """
        entry, now = get_or_compute(
            self.store,
            self.keys.loss(ranks, windows, predictions),
            self.keys.losses(),
            lambda: {"loss": torch.tensor(measure(), dtype=torch.float64)},
        )
        if not now:
            self.elsewhere.append(entry.cost)
        return float(entry.tensors["loss"])
