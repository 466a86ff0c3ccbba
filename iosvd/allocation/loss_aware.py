"""IO-SVD's allocation by the first-order change of the loss (arXiv 2605.15626)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.allocation.greedy import drop_cheapest
from iosvd.budget import Budget
from iosvd.errors import check_at_least
from iosvd.types import Needs, Spectrum

ALL_WINDOWS = 10**9


@dataclass(frozen=True)
class LossAware:
    """Drop the component with the smallest |g_i σ_i| among the sites' smallest σ (METHODS 5).

    The same rule as ZS-SVD's `smallest_mag` (arXiv 2602.02848). Never signed: there, signed greedy
    gave perplexities above 100 000 (its Table 6).
    """

    gradient_windows: int = 0  # Calibration windows of the gradient; 0: all of them.

    def __post_init__(self) -> None:
        check_at_least(0, gradient_windows=self.gradient_windows)

    @property
    def needs(self) -> Needs:
        return Needs(gradient_windows=self.gradient_windows or ALL_WINDOWS)

    def __call__(self, spectra: Mapping[str, Spectrum], budget: Budget) -> dict[str, int]:
        costs = {}
        for site, spectrum in spectra.items():
            assert spectrum.loss_change is not None, "the pipeline scores what needs a gradient"
            costs[site] = spectrum.loss_change.abs()
        return drop_cheapest(costs, budget)
