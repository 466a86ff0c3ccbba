"""The calibration loss with trial ranks: weights are truncated for a pass, then restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from iosvd.allocation.objective import CalibrationObjective
from iosvd.budget import Budget
from iosvd.cache.calibration import Calibration
from iosvd.cache.losses import CachedLosses
from iosvd.layers.replacement import gated, truncated_weights
from iosvd.models.losses import mean_loss, summed_loss
from iosvd.models.prefixes import Prefixes, remember
from iosvd.types import Spectrum


@dataclass(frozen=True)
class TruncationTrials(CalibrationObjective):
    """The calibration loss of the dense model with some of its sites truncated."""

    calibration: Calibration
    spectra: Mapping[str, Spectrum]
    budget: Budget
    losses: CachedLosses | None = None
    _remembered: dict[int, Prefixes] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.calibration.tokens.numel()

    @property
    def windows(self) -> int:
        return len(self.calibration.tokens)

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        model = self.calibration.model
        batch = self.calibration.tokens[chosen].to(model.device)
        with torch.enable_grad(), gated(self.calibration.sites, self.spectra, gates):
            logits = model(input_ids=batch, use_cache=False).logits
            labels = batch[:, 1:].to(logits.device)
            return summed_loss(logits, labels).cpu() / labels.numel()

    def loss(self, ranks: Mapping[str, int], windows: int) -> float:
        """Return the calibration loss, nats per token, with these ranks; other sites stay dense.

        Raises:
            NumericalError: it is not finite.
        """
        chosen, factorised = self._first(windows), self.budget.factorised(ranks)

        def measure() -> float:
            own = self.calibration
            prefixes = self._prefixes(windows)
            first = prefixes.first_changed(own.sites[site] for site in factorised)
            context = partial(prefixes.from_block, first)
            with truncated_weights(own.sites, self.spectra, factorised):
                return mean_loss(own.model, chosen, own.batch_size, context=context)

        if self.losses is None:
            return measure()
        return self.losses.of(factorised, len(chosen), measure)

    def _first(self, windows: int) -> Tensor:
        return self.calibration.tokens[:windows] if windows else self.calibration.tokens

    def _prefixes(self, windows: int) -> Prefixes:
        """Return the outputs of the dense model's blocks, computed at the first trial."""
        if windows not in self._remembered:
            chosen, own = self._first(windows), self.calibration
            self._remembered[windows] = remember(own.model, chosen, own.batch_size)
        return self._remembered[windows]
