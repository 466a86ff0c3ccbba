"""The same ratio for every site (SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.allocation.base import Allocation
from iosvd.allocation.objective import CalibrationObjective
from iosvd.allocation.shares import ranks_for_shares
from iosvd.budget import Budget
from iosvd.types import Spectrum


@dataclass(frozen=True)
class Uniform(Allocation):
    """k = ⌊ρ mn / (m+n)⌋ at every site.

    The budget that rounding down leaves is spent too, unless `spend_rest` is false: SVD-LLM's
    public code leaves it.
    """

    spend_rest: bool = True

    @property
    def spends_rest(self) -> bool:
        return self.spend_rest

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        shares = dict.fromkeys(budget.shapes, budget.ratio)
        return ranks_for_shares(shares, budget, spend_rest=self.spend_rest)
