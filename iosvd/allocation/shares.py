"""From the share that every site should keep to ranks that meet the budget."""

from __future__ import annotations

from collections.abc import Mapping

from iosvd.budget import ENTRY_BITS, Budget

_STEPS = 50  # Of the bisection: far below one component of the largest site.


def ranks_for_shares(
    shares: Mapping[str, float], budget: Budget, *, spend_rest: bool = True
) -> dict[str, int]:
    """Return k = ⌊share · mn / (m+n)⌋ at every site, within the budget and a component below it.

    Where floors overspend, all shares are scaled down alike. What rounding down leaves goes, one
    component at a time, to the sites that lost most by it.

    Args:
        shares: of each site's entries; above 1 the site stays dense.
        budget: feasible, as every `Budget` is.
        spend_rest: False leaves what rounding down leaves.
    """
    scale = 1.0
    if budget.cost(_rounded(_exact(shares, budget, scale), budget)) > budget.limit:
        scale = _largest_scale(shares, budget)
    exact = _exact(shares, budget, scale)
    ranks = _rounded(exact, budget)
    return _spend_rest(ranks, exact, budget) if spend_rest else ranks


def _exact(shares: Mapping[str, float], budget: Budget, scale: float) -> dict[str, float]:
    """Ranks as fractions: what fits into the share of a site's 16 bits; all of them if it may."""
    exact = {}
    for site, cost in budget.costs.items():
        bits = scale * shares[site] * ENTRY_BITS * budget.shapes[site].counted_entries
        fits = bits >= cost.dense
        exact[site] = (
            budget.shapes[site].full_rank if fits else (bits - cost.fixed) / cost.component
        )
    return exact


def _rounded(exact: Mapping[str, float], budget: Budget) -> dict[str, int]:
    floors = budget.floors
    return {
        site: min(max(floors[site], int(rank)), budget.shapes[site].full_rank)
        for site, rank in exact.items()
    }


def _largest_scale(shares: Mapping[str, float], budget: Budget) -> float:
    """Bisect for the largest scale that the budget allows; 0 leaves the floors, which it does."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        cost = budget.cost(_rounded(_exact(shares, budget, middle), budget))
        low, high = (middle, high) if cost <= budget.limit else (low, middle)
    return low


def _spend_rest(
    ranks: dict[str, int], exact: Mapping[str, float], budget: Budget
) -> dict[str, int]:
    rest, prices = budget.limit - budget.cost(ranks), budget.costs
    spent = True
    while spent:  # Once for the rounding; more often if the shares left much of the budget.
        spent = False
        for site in sorted(exact, key=lambda site: exact[site] - ranks[site], reverse=True):
            extra = prices[site].at(ranks[site] + 1) - prices[site].at(ranks[site])
            full = budget.shapes[site].full_rank
            if ranks[site] < full and extra <= rest:
                # Beyond break-even it is dense, at no further cost.
                beyond = ranks[site] >= prices[site].break_even_rank
                ranks[site] = full if beyond else ranks[site] + 1
                rest -= extra
                spent = True
    return ranks
