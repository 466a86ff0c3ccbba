"""ZS-SVD's allocation: predicted changes of the loss that cancel (arXiv 2602.02848)."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.allocation.loss_aware import ALL_WINDOWS
from iosvd.budget import Budget
from iosvd.errors import check_at_least
from iosvd.types import Needs, Spectrum


@dataclass(frozen=True)
class ZeroSum:
    """Keep the running sum of the dropped ΔL_i = −g_i σ_i near zero (METHODS 5).

    Each site offers its component of smallest σ. While the sum is not positive the smallest
    positive change is taken, else the smallest negative one in absolute value; where a sign has no
    offer, the other. Sites are charged their true cost; rank 1 is the floor.
    """

    gradient_windows: int = 0  # Calibration windows of the gradient; 0: all of them.

    def __post_init__(self) -> None:
        check_at_least(0, gradient_windows=self.gradient_windows)

    @property
    def needs(self) -> Needs:
        return Needs(gradient_windows=self.gradient_windows or ALL_WINDOWS)

    def __call__(self, spectra: Mapping[str, Spectrum], budget: Budget) -> dict[str, int]:
        changes = {}
        for site, spectrum in spectra.items():
            assert spectrum.loss_change is not None, "the pipeline scores what needs a gradient"
            changes[site] = spectrum.loss_change.tolist()
        ranks = {site: len(change) for site, change in changes.items()}
        rising: list[tuple[float, str]] = []
        falling: list[tuple[float, str]] = []

        def offer(site: str) -> None:
            if ranks[site] > 1:
                change = changes[site][ranks[site] - 1]
                heapq.heappush(rising if change > 0 else falling, (abs(change), site))

        for site in ranks:
            offer(site)
        prices, kept, total = budget.costs, budget.cost(ranks), 0.0
        while kept > budget.limit:
            first, second = (rising, falling) if total <= 0 else (falling, rising)
            _, site = heapq.heappop(first or second)
            rank = ranks[site]
            total += changes[site][rank - 1]
            ranks[site] = rank - 1
            kept -= prices[site].at(rank) - prices[site].at(rank - 1)
            offer(site)
        return ranks
