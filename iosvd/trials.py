"""Try ranks on the calibration set: the weights are truncated for a forward pass and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.budget import Budget
from iosvd.cache.losses import KeptLosses
from iosvd.layers.replacement import gated, truncated_weights
from iosvd.models.losses import mean_loss, summed_loss
from iosvd.models.prefixes import Prefixes, remember
from iosvd.types import Spectrum

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CalibrationTrial:
    """The dense model, the spectra of its sites, and the calibration set (`allocation.Trial`)."""

    model: PreTrainedModel
    sites: Mapping[str, nn.Linear]
    spectra: Mapping[str, Spectrum]
    budget: Budget
    calibration: Tensor  # (windows, length)
    batch_size: int
    kept: KeptLosses | None = None
    _remembered: dict[int, Prefixes] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the calibration set."""
        return self.calibration.numel()

    @property
    def windows(self) -> int:
        """Windows of the calibration set."""
        return len(self.calibration)

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Return the calibration loss with each component multiplied by its gate."""
        batch = self.calibration[chosen].to(self.model.device)
        with torch.enable_grad(), gated(self.sites, self.spectra, gates):
            logits = self.model(input_ids=batch, use_cache=False).logits
            labels = batch[:, 1:].to(logits.device)
            return summed_loss(logits, labels).cpu() / labels.numel()

    def loss(self, ranks: Mapping[str, int], windows: int) -> float:
        """Return the calibration loss, nats per token, with these ranks; other sites stay dense.

        Raises:
            NumericalError: it is not finite.
        """
        chosen = self.calibration[:windows] if windows else self.calibration
        costs = self.budget.costs
        factorised = {s: rank for s, rank in ranks.items() if rank <= costs[s].break_even_rank}

        def measure() -> float:
            prefixes = self._prefixes(windows)
            first = prefixes.first_changed(self.sites[site] for site in factorised)
            with truncated_weights(self.sites, self.spectra, factorised):
                return mean_loss(
                    self.model, chosen, self.batch_size, context=partial(prefixes.from_block, first)
                )

        return measure() if self.kept is None else self.kept.of(factorised, len(chosen), measure)

    def _prefixes(self, windows: int) -> Prefixes:
        """Return what the dense model's blocks put out, computed at the first trial."""
        if windows not in self._remembered:
            chosen = self.calibration[:windows] if windows else self.calibration
            self._remembered[windows] = remember(self.model, chosen, self.batch_size)
        return self._remembered[windows]
