"""The cost of ranks in bits, and the budget of a maintenance ratio (METHODS 4 and 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from iosvd.errors import BudgetError

ENTRY_BITS = 16  # Of an entry of the dense model, whatever its dtype.


@dataclass(frozen=True)
class Shape:
    """A site's weight, (out, in)."""

    m: int
    n: int
    adds_bias: bool = False  # Whether it gets a bias when it is factorised.
    cached_width: int = 0  # Entries of a cache for each token; of a latent, its rank.
    cached_tokens: int = 0  # Tokens whose entries count; 0 where nothing is cached.

    @property
    def full_rank(self) -> int:
        return min(self.m, self.n)

    @property
    def entries(self) -> int:
        return self.m * self.n

    @property
    def counted_entries(self) -> int:
        """Entries of the dense weight, and of the cache that counts beside it."""
        return self.entries + self.cached_entries(self.cached_width)

    def cached_entries(self, width: int) -> int:
        """Entries of the cache that counts, for so many of each token."""
        return width * self.cached_tokens

    def entries_at(self, rank: int) -> int:
        """Entries of the two factors, and of the bias that comes with them."""
        return rank * (self.m + self.n) + self.m * self.adds_bias


@dataclass(frozen=True)
class SiteCost:
    """Bits that a quantisation stores for a site: dense, or `fixed` plus `component` per rank."""

    dense: int
    fixed: int
    component: int
    largest_rank: int | None = None  # Of factors, whatever they would save; None: any.

    def at(self, rank: int) -> int:
        """Bits stored for a rank; above break-even the site stays dense."""
        factorised = rank <= self.break_even_rank
        return self.fixed + rank * self.component if factorised else self.dense

    @property
    def break_even_rank(self) -> int:
        """The largest rank whose factors are smaller than the dense weight; 0: always dense."""
        rank = max(0, (self.dense - self.fixed - 1) // self.component)
        return rank if self.largest_rank is None else min(rank, self.largest_rank)

    def with_bias(self, outputs: int) -> SiteCost:
        """Return the cost with a bias of this many outputs if the site is factorised."""
        return replace(self, fixed=self.fixed + ENTRY_BITS * outputs)

    def with_cache(self, width: int, tokens: int) -> SiteCost:
        """Return the cost with so many cached tokens: of this width if dense, else of latents."""
        token = ENTRY_BITS * tokens
        return replace(self, dense=self.dense + width * token, component=self.component + token)


def sixteen_bits(shape: Shape) -> SiteCost:
    """Return the cost without quantisation: 16 bits per entry."""
    return SiteCost(ENTRY_BITS * shape.entries, fixed=0, component=ENTRY_BITS * (shape.m + shape.n))


def site_cost(shape: Shape, cost_of: Callable[[Shape], SiteCost]) -> SiteCost:
    """Return the cost of a site under a quantisation, with its bias and its share of a cache."""
    cost = cost_of(shape).with_bias(shape.m if shape.adds_bias else 0)
    if shape.cached_tokens:
        cost = cost.with_cache(shape.cached_width, shape.cached_tokens)
        # A long cache would pay for factors of any rank, but full rank means dense everywhere.
        cost = replace(cost, largest_rank=shape.full_rank - 1)
    return cost


@dataclass(frozen=True)
class Budget:
    """The maintenance ratio over all target sites: bits kept / 16 bits for every entry.

    Without quantisation that is parameters kept / parameters of the sites. Where shapes have cached
    tokens, the entries of the cache count like those of weights, in both.

    Args:
        shapes: of the sites.
        ratio: bits kept / 16 bits per entry.
        cost_of: the cost of a site under the quantisation.
        min_rank_fraction: of its break-even rank, which every site keeps; at least rank 1.

    Raises:
        BudgetError: the ratio is outside (0, 1], or below what the least ranks need.
    """

    shapes: Mapping[str, Shape]
    ratio: float
    cost_of: Callable[[Shape], SiteCost] = sixteen_bits
    min_rank_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_fraction(self.min_rank_fraction)
        if self.cost(self.floors) > self.limit:
            # Rounded up, so that the number in the message is itself feasible.
            smallest = math.ceil(1e4 * self.smallest_ratio) / 1e4
            dense = all(cost.break_even_rank == 0 for cost in self.costs.values())
            least = f"min_rank_fraction={self.min_rank_fraction:g}"
            raise BudgetError(
                f"ratio {self.ratio:.10g} is below {smallest:g}, what"
                f" {'storing' if dense else least if self.min_rank_fraction else 'rank 1'}"
                f"{'' if dense else ' at'} every one of the {len(self.shapes)} sites needs;"
                f" raise ratio{', lower min_rank_fraction' if self.min_rank_fraction else ''}"
                " or exclude sites (model.sites.exclude)"
            )

    @cached_property
    def costs(self) -> dict[str, SiteCost]:
        """The cost of every site."""
        return {site: site_cost(shape, self.cost_of) for site, shape in self.shapes.items()}

    @cached_property
    def floors(self) -> dict[str, int]:
        """The least rank of every site."""
        return {
            site: max(1, math.ceil(self.min_rank_fraction * cost.break_even_rank))
            for site, cost in self.costs.items()
        }

    @cached_property
    def smallest_ratio(self) -> float:
        """The ratio that the least ranks cost."""
        return self.cost(self.floors) / self.total

    @cached_property
    def total(self) -> int:
        """Bits of all target sites, dense, and of what a cache holds of them."""
        return ENTRY_BITS * sum(shape.counted_entries for shape in self.shapes.values())

    @cached_property
    def counts_cache(self) -> bool:
        """Whether entries of a cache count beside those of weights."""
        return any(shape.cached_entries(1) for shape in self.shapes.values())

    @cached_property
    def limit(self) -> int:
        """Bits that may be kept."""
        # Rounded first: 0.8 * 45 is 36.00000000000001, but 0.7 * 10 is 6.999999999999999.
        return math.floor(round(self.ratio * self.total, 6))

    @cached_property
    def full_ranks(self) -> dict[str, int]:
        """The full rank of every site, at which it is dense."""
        return {site: shape.full_rank for site, shape in self.shapes.items()}

    @property
    def fits_dense(self) -> bool:
        """Whether every site may stay dense, so that nothing has to be dropped."""
        return self.cost(self.full_ranks) <= self.limit

    def cost(self, ranks: Mapping[str, int]) -> int:
        """Bits kept under these ranks."""
        return sum(cost.at(ranks[site]) for site, cost in self.costs.items())

    def bias_bits(self, ranks: Mapping[str, int]) -> int:
        """Return the bits of the biases that a correction adds to sites of these ranks."""
        shapes = (self.shapes[site] for site in self.factorised(ranks))
        return ENTRY_BITS * sum(shape.m for shape in shapes if shape.adds_bias)

    def is_factorised(self, site: str, rank: int) -> bool:
        """Whether a site of this rank is factorised: not above break-even."""
        return rank <= self.costs[site].break_even_rank

    def factorised(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Return the ranks of the sites that are not dense, in the order of the sites."""
        return {s: ranks[s] for s in self.shapes if s in ranks and self.is_factorised(s, ranks[s])}


def check_ratio(ratio: float) -> None:
    """Raise BudgetError unless the ratio is in (0, 1]."""
    if not 0 < ratio <= 1:
        raise BudgetError(
            f"ratio {ratio:.10g} is outside (0, 1];"
            " it is the share of the 16-bit model that is kept"
        )


def check_fraction(min_rank_fraction: float) -> None:
    """Raise BudgetError unless the fraction is in [0, 1]."""
    if not 0 <= min_rank_fraction <= 1:
        raise BudgetError(f"min_rank_fraction={min_rank_fraction:g} is outside [0, 1]")
