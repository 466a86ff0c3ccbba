"""What a quantisation is given, what it returns, and what every quantisation is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from iosvd.budget import Budget, Shape, SiteCost
from iosvd.types import Factors


@dataclass(frozen=True)
class Matrix:
    """A matrix that is to be stored, and what the loss thinks of its entries.

    To second order, errors δ of independent signs cost ½ Σ a_o b_i δ_oi² (METHODS 2.2): a is the
    diagonal of the output metric seen by the matrix, b that of the input metric. For a factor the
    other factor is part of its metric, and there diagonal: the components are orthogonal.
    """

    values: Tensor  # (out, in)
    output_metric: Tensor  # (out,)
    input_metric: Tensor  # (in,)
    gradient: Tensor | None = None  # of the mean calibration loss, (out, in)


@dataclass(frozen=True)
class Site:
    """A site after truncation: two factors, or its weight where it stays dense."""

    name: str
    weight: Tensor  # (m, n), dense
    factors: Factors | None
    output_diagonal: Tensor  # (m,) of the output metric
    input_diagonal: Tensor  # (n,) of the input metric
    gradient: Tensor | None = None  # (m, n), with respect to what the site multiplies by now

    def matrices(self) -> dict[str, Matrix]:
        """Return the site's matrices, named as its layer names them."""
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        device = self.weight.device if self.factors is None else self.factors.left.device
        a, b = self.output_diagonal.to(device, kind), self.input_diagonal.to(device, kind)
        g = None if self.gradient is None else self.gradient.to(device, kind)
        if self.factors is None:
            return {"weight": Matrix(self.weight.detach().to(kind), a, b, g)}
        left, right = self.factors.left.to(kind), self.factors.right.to(kind)
        to_left = None if g is None else g @ right.T
        to_right = None if g is None else left.T @ g
        return {
            "weight": Matrix(right, self.factors.left_energy.to(kind), b, to_right),
            "left": Matrix(left, a, self.factors.right_energy.to(kind), to_left),
        }


class Stored(Protocol):
    """A site as it will be stored."""

    @property
    def bits(self) -> int:
        """Bits stored."""
        ...

    @property
    def rounded(self) -> tuple[int, int]:
        """How many of its rows are not in 16 bits, and how many rows there are."""
        ...

    @property
    def rounding_loss(self) -> float:
        """What rounding costs to second order, in the units of ½ Σ σ²."""
        ...

    def module(self, layer: nn.Module) -> nn.Module:
        """Return the layer that holds it, with the bias of the layer it replaces."""
        ...


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
