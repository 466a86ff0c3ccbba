"""IO-SVD's allocation by the first-order change of the loss (arXiv 2605.15626)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.allocation.base import Allocation
from iosvd.allocation.first_order import FirstOrder, loss_changes
from iosvd.allocation.greedy import drop_cheapest, per_bit
from iosvd.allocation.objective import CalibrationObjective
from iosvd.budget import Budget
from iosvd.types import Spectrum


@dataclass(frozen=True)
class LossAware(FirstOrder, Allocation):
    """Drop the component with the smallest |g_i σ_i| among the sites' smallest σ (METHODS 5).

    The same rule as ZS-SVD's `smallest_mag` (arXiv 2602.02848). Never signed: there, signed greedy
    gave perplexities above 100 000 (its Table 6).
    """

    per_parameter: bool = False  # Divide by the bits that the component costs.

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        costs = {site: change.abs() for site, change in loss_changes(spectra).items()}
        if self.per_parameter or budget.counts_cache:  # Else k and v, with a cache, stay whole.
            costs = per_bit(costs, budget)
        return drop_cheapest(costs, budget)
