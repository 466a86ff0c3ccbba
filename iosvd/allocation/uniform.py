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
    """k = ⌊ρ mn / (m+n)⌋ at every site; the budget that rounding down leaves is spent too."""

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        return ranks_for_shares(dict.fromkeys(budget.shapes, budget.ratio), budget)
