"""ZS-SVD's allocation: predicted changes of the loss that cancel (arXiv 2602.02848)."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.allocation.base import Allocation
from iosvd.allocation.first_order import FirstOrder, loss_changes
from iosvd.allocation.greedy import refilled
from iosvd.allocation.objective import CalibrationObjective
from iosvd.budget import Budget
from iosvd.types import Spectrum


@dataclass(frozen=True)
class ZeroSum(FirstOrder, Allocation):
    """Keep the running sum of the dropped ΔL_i = −g_i σ_i near zero (METHODS 5).

    Each site offers its component of smallest σ. While the sum is not positive the smallest
    positive change is taken, else the smallest negative one in absolute value; if there is none of
    that sign, one of the other. Sites are charged their true cost; none goes below its floor.
    """

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        changes = {site: change.tolist() for site, change in loss_changes(spectra).items()}
        ranks = {site: len(change) for site, change in changes.items()}
        floors, prices = budget.floors, budget.costs
        rising: list[tuple[float, str]] = []
        falling: list[tuple[float, str]] = []

        def offer(site: str) -> None:
            if ranks[site] > floors[site]:
                change = changes[site][ranks[site] - 1]
                size = abs(change) / (prices[site].component if budget.counts_cache else 1)
                heapq.heappush(rising if change > 0 else falling, (size, site))

        for site in ranks:
            offer(site)
        kept, total = budget.cost(ranks), 0.0
        while kept > budget.limit:
            first, second = (rising, falling) if total <= 0 else (falling, rising)
            _, site = heapq.heappop(first or second)
            rank = ranks[site]
            total += changes[site][rank - 1]
            ranks[site] = rank - 1
            kept -= prices[site].at(rank) - prices[site].at(rank - 1)
            offer(site)
        if not budget.counts_cache:
            return ranks
        sizes = {site: [abs(change) for change in values] for site, values in changes.items()}
        return refilled(ranks, sizes, budget)
