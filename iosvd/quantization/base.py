"""The contract of a quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from iosvd.budget import Budget, Shape, SiteCost
from iosvd.types import Site, Stored


class Quantization(Protocol):
    """Stores the matrices of sites within a budget of bits: a frozen dataclass, one file each.

    The defaults need no gradient and plan the ranks under the budget itself.
    """

    @property
    def rounds(self) -> bool:
        """Whether anything is stored in another dtype than the model's."""
        return True

    @property
    def gradient_windows(self) -> int:
        """Calibration windows of the loss gradient at the truncated weights; 0: none needed."""
        return 0

    def cost(self, shape: Shape) -> SiteCost:
        """Return the cost that ranks are planned with: the fewest bits that a site may take."""
        ...

    def rank_budgets(self, budget: Budget) -> list[Budget]:
        """Return the budgets that ranks may be planned under; the pipeline takes the best.

        Raises:
            BudgetError: the ranks do not fit.
        """
        return [budget]

    def predicted_loss(self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype) -> float:
        """Return the second-order loss of rounding these sites; needs no gradient."""
        return sum(stored.rounding_loss for stored in self(sites, limit, dtype).values())

    def __call__(
        self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        """Return the sites that are not stored in the model's dtype, within a limit of bits.

        Args:
            sites: all sites.
            limit: bits for all of them.
            dtype: of the rows that stay in 16 bits.
        """
        ...
