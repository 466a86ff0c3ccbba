"""What ranks cost, and how many parameters may be kept (METHODS 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.errors import BudgetError


@dataclass(frozen=True)
class Shape:
    """A site's weight, (out, in)."""

    m: int
    n: int

    @property
    def full_rank(self) -> int:
        return min(self.m, self.n)

    @property
    def dense_cost(self) -> int:
        return self.m * self.n

    @property
    def component_cost(self) -> int:
        """Parameters of one more rank."""
        return self.m + self.n

    @property
    def break_even_rank(self) -> int:
        """The largest rank whose factors are smaller than the dense weight."""
        return (self.m * self.n - 1) // (self.m + self.n)

    def cost(self, rank: int) -> int:
        """Parameters stored for a rank; above break-even the site stays dense."""
        return min(self.dense_cost, rank * self.component_cost)


@dataclass(frozen=True)
class Budget:
    """The maintenance ratio over all target sites: parameters kept / parameters of the sites.

    Raises:
        BudgetError: the ratio is outside (0, 1], or below what rank 1 at every site needs.
    """

    shapes: Mapping[str, Shape]
    ratio: float

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        floor = sum(shape.cost(1) for shape in self.shapes.values())
        if floor > self.limit:
            # Rounded up, so that the number in the message is itself feasible.
            smallest = math.ceil(1e4 * floor / self.total) / 1e4
            raise BudgetError(
                f"ratio {self.ratio:g} is below {smallest:g}, what rank 1 at every one of the"
                f" {len(self.shapes)} sites needs;"
                " raise ratio or exclude sites (model.sites.exclude)"
            )

    @property
    def total(self) -> int:
        """Parameters of all target sites."""
        return sum(shape.dense_cost for shape in self.shapes.values())

    @property
    def limit(self) -> int:
        """Parameters that may be kept."""
        # Rounded first: 0.8 * 45 is 36.00000000000001, but 0.7 * 10 is 6.999999999999999.
        return math.floor(round(self.ratio * self.total, 6))

    def cost(self, ranks: Mapping[str, int]) -> int:
        """Parameters kept under these ranks."""
        return sum(shape.cost(ranks[site]) for site, shape in self.shapes.items())


def check_ratio(ratio: float) -> None:
    """Raise BudgetError unless the ratio is in (0, 1]."""
    if not 0 < ratio <= 1:
        raise BudgetError(
            f"ratio {ratio:g} is outside (0, 1]; it is the share of the parameters that is kept"
        )
