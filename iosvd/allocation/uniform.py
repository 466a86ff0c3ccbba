"""The same ratio for every site (SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.budget import ENTRY_BITS, Budget
from iosvd.types import Needs, Spectrum


@dataclass(frozen=True)
class Uniform:
    """k = ⌊ρ mn / (m+n)⌋ at every site, at least 1; if quantised, what fits into ρ of its bits.

    What rounding down leaves of the budget goes, one component a site, to the sites that lost most
    by it; so the ratio is met as closely as by the other allocations.
    """

    @property
    def needs(self) -> Needs:
        return Needs()

    def __call__(self, spectra: Mapping[str, Spectrum], budget: Budget) -> dict[str, int]:
        exact = {
            site: (budget.ratio * ENTRY_BITS * budget.shapes[site].entries - cost.fixed)
            / cost.component
            for site, cost in budget.costs.items()
        }
        ranks = {
            site: min(max(1, int(rank)), budget.shapes[site].full_rank)
            for site, rank in exact.items()
        }
        _return_excess(ranks, budget)
        return _spend_rest(ranks, exact, budget)


def _return_excess(ranks: dict[str, int], budget: Budget) -> None:
    """Where the floor of rank 1 overspent, take components from the largest ranks."""
    while budget.cost(ranks) > budget.limit:
        largest = max(ranks, key=lambda site: ranks[site])
        ranks[largest] -= 1


def _spend_rest(
    ranks: dict[str, int], exact: Mapping[str, float], budget: Budget
) -> dict[str, int]:
    rest, prices = budget.limit - budget.cost(ranks), budget.costs
    for site in sorted(exact, key=lambda site: exact[site] - ranks[site], reverse=True):
        extra = prices[site].at(ranks[site] + 1) - prices[site].at(ranks[site])
        if ranks[site] < budget.shapes[site].full_rank and extra <= rest:
            ranks[site] += 1
            rest -= extra
    return ranks
