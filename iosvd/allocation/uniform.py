"""The same ratio for every site (SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.allocation.base import Allocation
from iosvd.allocation.shares import ranks_for_shares
from iosvd.allocation.trial import Trial
from iosvd.budget import Budget
from iosvd.types import Spectrum


@dataclass(frozen=True)
class Uniform(Allocation):
    """k = ⌊ρ mn / (m+n)⌋ at every site; what rounding down leaves of the budget is given back."""

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, trial: Trial
    ) -> dict[str, int]:
        return ranks_for_shares(dict.fromkeys(budget.shapes, budget.ratio), budget)
