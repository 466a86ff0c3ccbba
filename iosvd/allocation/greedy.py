"""Drop one component at a time, everywhere at once, until the budget is met."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from torch import Tensor

from iosvd.budget import Budget


def drop_cheapest(costs: Mapping[str, Tensor], budget: Budget) -> dict[str, int]:
    """Return the ranks that are left after dropping the cheapest components.

    Each site offers its component of smallest σ, the last of its list; of these the one with the
    smallest cost is dropped. Sites are charged their true cost: above break-even a drop saves
    nothing, and a site that ends there stays dense. No site goes below its floor.

    Where a cache counts, a component of keys or values may cost many times another's: the last one
    dropped then frees more than was asked for, and the rest goes to the best components that fit.

    Args:
        costs: per site, the loss predicted for dropping each component, in the order of σ.
        budget: feasible, as every `Budget` is.
    """
    values = {site: cost.tolist() for site, cost in costs.items()}
    ranks = {site: len(cost) for site, cost in values.items()}
    floors, prices = budget.floors, budget.costs
    offers = [(cost[-1], site) for site, cost in values.items() if len(cost) > floors[site]]
    heapq.heapify(offers)
    kept = budget.cost(ranks)
    while kept > budget.limit:
        _, site = heapq.heappop(offers)
        rank = ranks[site]
        ranks[site] = rank - 1
        kept -= prices[site].at(rank) - prices[site].at(rank - 1)
        if rank - 1 > floors[site]:
            heapq.heappush(offers, (values[site][rank - 2], site))
    return refilled(ranks, values, budget) if budget.counts_cache else ranks


def per_bit(costs: Mapping[str, Tensor], budget: Budget) -> dict[str, Tensor]:
    """Divide the costs of components by the bits that each would free."""
    return {site: cost / budget.costs[site].component for site, cost in costs.items()}


def refilled(
    ranks: dict[str, int], values: Mapping[str, list[float]], budget: Budget
) -> dict[str, int]:
    """Take dropped components back, the dearest first, as long as the budget allows."""
    rest, prices = budget.limit - budget.cost(ranks), budget.costs
    offers = [
        (-value[ranks[site]], site) for site, value in values.items() if ranks[site] < len(value)
    ]
    heapq.heapify(offers)
    while offers:
        _, site = heapq.heappop(offers)
        rank = ranks[site]
        extra = prices[site].at(rank + 1) - prices[site].at(rank)
        if extra > rest:
            continue  # Nor do its later ones fit.
        ranks[site], rest = rank + 1, rest - extra
        if rank + 1 < len(values[site]):
            heapq.heappush(offers, (-values[site][rank + 1], site))
    return ranks
