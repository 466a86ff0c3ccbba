"""Allocation by the second-order prediction: drop the smallest σ² of all sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.allocation.base import Allocation
from iosvd.allocation.greedy import drop_cheapest, per_bit
from iosvd.allocation.objective import CalibrationObjective
from iosvd.budget import Budget
from iosvd.types import Spectrum


@dataclass(frozen=True)
class Spectral(Allocation):
    """Drop the globally smallest ½ σ_i² (METHODS 5, ours).

    With `input_output` whitening this is the KL divergence in nats per token that identity 5
    predicts, so sites compare directly; it needs no gradient.
    """

    per_parameter: bool = False  # Divide by the bits that the component costs.

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        costs = {site: 0.5 * spectrum.sigma**2 for site, spectrum in spectra.items()}
        if self.per_parameter or budget.counts_cache:  # Else k and v, with a cache, stay whole.
            costs = per_bit(costs, budget)
        return drop_cheapest(costs, budget)
