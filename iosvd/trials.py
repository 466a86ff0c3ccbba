"""Losses and divergences with trial ranks: weights are truncated for a pass, then restored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iosvd.allocation.objective import CalibrationObjective, Predictions
from iosvd.budget import Budget
from iosvd.cache.calibration import Calibration
from iosvd.cache.losses import CachedLosses
from iosvd.errors import NumericalError
from iosvd.layers.replacement import (
    gated,
    replaced_weights,
    truncated_products,
    truncated_weights,
)
from iosvd.models.losses import mean_loss, summed_loss
from iosvd.models.predictions import summed_divergence
from iosvd.models.prefixes import Prefixes, remember
from iosvd.types import Spectrum

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TruncationTrials(CalibrationObjective):
    """Measures the dense model with some of its sites truncated, on the calibration set."""

    calibration: Calibration
    spectra: Mapping[str, Spectrum]
    budget: Budget
    losses: CachedLosses | None = None
    _remembered: dict[int, Prefixes] = field(default_factory=dict)
    _measured: dict[str, float] = field(default_factory=dict)  # Where no store keeps them.

    @property
    def tokens(self) -> int:
        return self.calibration.tokens.numel()

    @property
    def windows(self) -> int:
        return len(self.calibration.tokens)

    @property
    def length(self) -> int:
        return self.calibration.tokens.shape[1]

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
        own, chosen = self.calibration, self._first(windows)
        factorised = self.budget.factorised(ranks)

        def measure() -> float:
            context = self._from_changed(factorised, windows)
            with truncated_weights(own.sites, self.spectra, factorised):
                return mean_loss(own.model, chosen, own.batch_size, context=context)

        return self._once(factorised, len(chosen), measure)

    def divergence(self, ranks: Mapping[str, int], windows: int, predictions: Predictions) -> float:
        """Return KL(dense ‖ truncated), nats per token, with these ranks; others stay dense.

        Raises:
            NumericalError: it is not finite.
        """
        own, chosen = self.calibration, self._first(windows)
        factorised = self.budget.factorised(ranks)
        first = predictions.first_position

        def measure() -> float:
            prefixes, total = self._prefixes(windows), 0.0
            weights = truncated_products(own.sites, self.spectra, factorised)
            context = self._from_changed(factorised, windows)
            for start in range(0, len(chosen), own.batch_size):
                batch = chosen[start : start + own.batch_size].to(own.model.device)
                with prefixes.from_block(len(prefixes.blocks), start):
                    reference = _logits(own.model, batch, first)
                with replaced_weights(own.sites, weights.items()), context(start):
                    found = _logits(own.model, batch, first)
                total += float(summed_divergence(reference, found, predictions.temperature))
            if not math.isfinite(total):
                raise NumericalError(
                    f"the divergence with {', '.join(factorised)} truncated is not finite; try"
                    " model.dtype=float32 or bfloat16"
                )
            return total / (len(chosen) * (self.length - first))

        return self._once(factorised, len(chosen), measure, predictions)

    def _from_changed(
        self, ranks: Mapping[str, int], windows: int
    ) -> Callable[[int], AbstractContextManager[None]]:
        prefixes, sites = self._prefixes(windows), self.calibration.sites
        return partial(prefixes.from_block, prefixes.first_changed(sites[s] for s in ranks))

    def _once(
        self,
        ranks: Mapping[str, int],
        windows: int,
        measure: Callable[[], float],
        predictions: Predictions | None = None,
    ) -> float:
        asked = f"{sorted(ranks.items())} {windows} {predictions}"
        if asked not in self._measured:
            once = self.losses
            found = measure() if once is None else once.of(ranks, windows, measure, predictions)
            self._measured[asked] = found
        return self._measured[asked]

    def _first(self, windows: int) -> Tensor:
        return self.calibration.tokens[:windows] if windows else self.calibration.tokens

    def _prefixes(self, windows: int) -> Prefixes:
        """Return the outputs of the dense model's blocks, computed at the first trial."""
        if windows not in self._remembered:
            chosen, own = self._first(windows), self.calibration
            self._remembered[windows] = remember(own.model, chosen, own.batch_size)
        return self._remembered[windows]


@torch.inference_mode()
def _logits(model: PreTrainedModel, batch: Tensor, first: int) -> Tensor:
    """Return the logits from a position on."""
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits[:, first:]
