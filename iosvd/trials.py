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
    perturbed,
    replaced_weights,
    truncated_products,
    truncated_weights,
)
from iosvd.models.losses import mean_loss, summed_loss
from iosvd.models.predictions import summed_divergence
from iosvd.models.prefixes import Prefixes, remember
from iosvd.types import Spectrum
from iosvd.windows import Windows

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
        return int(self.calibration.windows.token_counts.sum())

    @property
    def windows(self) -> int:
        return len(self.calibration.windows)

    @property
    def length(self) -> int:
        return self.calibration.windows.length

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        batch = self.calibration.windows[chosen]
        with torch.enable_grad(), gated(self.calibration.sites, self.spectra, gates):
            logits = batch.logits(self.calibration.model)
            return summed_loss(logits, batch.labels).cpu() / int(batch.predictions.sum())

    def component_derivatives(self, counts: Mapping[str, int], chosen: Tensor) -> dict[str, Tensor]:
        changes = {site: torch.zeros(count, requires_grad=True) for site, count in counts.items()}
        own, batch = self.calibration, self.calibration.windows[chosen]
        with torch.enable_grad(), perturbed(own.sites, self.spectra, changes):
            loss = summed_loss(batch.logits(own.model), batch.labels).cpu()
            # Some experts see none of these tokens.
            loss = loss / int(batch.predictions.sum())
            found = torch.autograd.grad(loss, list(changes.values()), materialize_grads=True)
        return dict(zip(changes, found, strict=True))

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
        own = self.calibration
        factorised = self.budget.factorised(ranks)
        chosen = self._first(windows).from_position(predictions.first_position)

        def measure() -> float:
            prefixes, total = self._prefixes(windows), 0.0
            weights = truncated_products(own.sites, self.spectra, factorised)
            context = self._from_changed(factorised, windows)
            for start in range(0, len(chosen), own.batch_size):
                batch = chosen[start : start + own.batch_size]
                with prefixes.from_block(len(prefixes.blocks), start):
                    reference = _predictions(own.model, batch)
                with replaced_weights(own.sites, weights.items()), context(start):
                    found = _predictions(own.model, batch)
                total += float(summed_divergence(reference, found, predictions.temperature))
            if not math.isfinite(total):
                raise NumericalError(
                    f"the divergence with {', '.join(factorised)} truncated is not finite; try"
                    " model.dtype=float32 or bfloat16"
                )
            return total / int(chosen.positions.sum())

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

    def _first(self, windows: int) -> Windows:
        return self.calibration.windows[:windows] if windows else self.calibration.windows

    def _prefixes(self, windows: int) -> Prefixes:
        """Return the outputs of the dense model's blocks, computed at the first trial."""
        if windows not in self._remembered:
            chosen, own = self._first(windows), self.calibration
            self._remembered[windows] = remember(own.model, chosen, own.batch_size)
        return self._remembered[windows]


@torch.inference_mode()
def _predictions(model: PreTrainedModel, batch: Windows) -> Tensor:
    """Return the logits that count."""
    return batch.chosen(batch.logits(model))
