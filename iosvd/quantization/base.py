"""What a quantisation is given, what it returns, and what every quantisation is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from iosvd.budget import Budget, Shape, SiteCost
from iosvd.types import Site, Stored


class Quantization(Protocol):
    """What every quantisation is: a frozen dataclass, one file each.

    What it does not say otherwise, it inherits: no gradient is needed, and ranks are planned under
    the budget itself.
    """

    @property
    def rounds(self) -> bool:
        """Whether anything is stored otherwise than in the model's dtype."""
        return True

    @property
    def gradient_windows(self) -> int:
        """Calibration windows of the loss gradient at the truncated weights; 0: none needed."""
        return 0

    def cost(self, shape: Shape) -> SiteCost:
        """Return what ranks are planned with: the fewest bits that a site may take."""
        ...

    def rank_budgets(self, budget: Budget) -> list[Budget]:
        """Return the budgets that ranks may be planned under; of several the best is taken.

        Raises:
            BudgetError: what was asked does not fit.
        """
        return [budget]

    def predicted_loss(self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype) -> float:
        """Return what rounding these sites would cost to second order; needs no gradient."""
        return sum(stored.rounding_loss for stored in self(sites, limit, dtype).values())

    def __call__(
        self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        """Return what is stored otherwise than in the model's dtype, within a limit of bits.

        Args:
            sites: all sites.
            limit: bits for all of them.
            dtype: of what stays in 16 bits.
        """
        ...
