"""ASVD's allocation: each site's ratio by its measured sensitivity (arXiv 2312.05821)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from iosvd.allocation.base import Allocation
from iosvd.allocation.objective import CalibrationObjective
from iosvd.allocation.shares import ranks_for_shares
from iosvd.budget import Budget, Shape
from iosvd.errors import ConfigError, check_at_least
from iosvd.system.progress import track
from iosvd.types import Spectrum


@dataclass(frozen=True)
class SensitivitySearch(Allocation):
    """Truncate one site at a time to each of some ratios and measure its loss (METHODS 5).

    Under a threshold τ each site takes the smallest ratio whose loss is at most τ, or stays dense;
    τ is found by binary search over the measured losses, the smallest that meets the budget. What
    the steps between ratios leave of it is spent one component a site.
    """

    # The paper's; the public code takes 0.4 to 0.9.
    ratios: list[float] = field(default_factory=lambda: [i / 10 for i in range(1, 10)])
    windows: int = 8  # Calibration windows of a measurement; 0: all. The public code takes 32.

    def __post_init__(self) -> None:
        check_at_least(0, windows=self.windows)
        if not self.ratios or not all(0 < ratio < 1 for ratio in self.ratios):
            raise ConfigError(f"ratios={self.ratios} must be shares in (0, 1), at least one")

    @property
    def trial_windows(self) -> int:
        return self.windows

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        losses = self._sensitivities(budget, objective)
        levels = sorted(set(losses.values()))
        low, high = 0, len(levels) - 1  # Everything at its smallest ratio is the last resort.
        while low < high:
            middle = (low + high) // 2
            fits = _cost(_shares(losses, levels[middle], budget), budget) <= budget.limit
            low, high = (low, middle) if fits else (middle + 1, high)
        threshold = levels[low] if levels else 0.0
        return ranks_for_shares(_shares(losses, threshold, budget), budget)

    def _sensitivities(
        self, budget: Budget, objective: CalibrationObjective
    ) -> dict[tuple[str, float], float]:
        """Return the measured loss by site and ratio, without ratios below the site's floor."""
        floors = budget.floors
        asked = [
            (site, ratio)
            for site, shape in budget.shapes.items()
            for ratio in sorted(self.ratios)
            if _rank(ratio, shape) >= floors[site]
        ]
        return {
            (site, ratio): objective.loss({site: _rank(ratio, budget.shapes[site])}, self.windows)
            for site, ratio in track(asked, len(asked), "sensitivities", "trial")
        }


def _rank(ratio: float, shape: Shape) -> int:
    component = shape.m + shape.n + shape.cached_entries(1)
    return max(1, int((ratio * shape.counted_entries - shape.entries_at(0)) / component))


def _shares(
    losses: Mapping[tuple[str, float], float], threshold: float, budget: Budget
) -> dict[str, float]:
    shares = dict.fromkeys(budget.shapes, 1.0)
    for (site, ratio), loss in losses.items():
        if loss <= threshold:
            shares[site] = min(shares[site], ratio)
    return shares


def _cost(shares: Mapping[str, float], budget: Budget) -> int:
    """Bits of the shares before what is left of the budget is spent."""
    ranks = {
        site: shape.full_rank if shares[site] == 1 else _rank(shares[site], shape)
        for site, shape in budget.shapes.items()
    }
    return budget.cost(ranks)
