"""LEMS: measured sensitivities, spectra and depth in one integer program (arXiv 2610.32878)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from iosvd.allocation.base import Allocation
from iosvd.allocation.choice import Option, cheapest_choice
from iosvd.allocation.objective import CalibrationObjective, Predictions
from iosvd.allocation.search import best_parameters
from iosvd.budget import Budget
from iosvd.errors import BudgetError, ConfigError, check_at_least
from iosvd.models.sites import layer_and_role
from iosvd.system.progress import track
from iosvd.types import Spectrum

log = logging.getLogger(__name__)
_ALPHA, _GAMMA = (0.0, 3.0), (0.0, 7.0)  # The ranges that are searched.
_LEAST_TAIL = 1e-6


@dataclass(frozen=True)
class Lems(Allocation):
    """Choose one rank a site with the least total cost under the budget (METHODS 11.2).

    A rank costs KL₀ · tail(rank) · depth, and a dense site nothing. KL₀ is the measured divergence
    of the model with only this site truncated, to `reference` of its break-even rank r*; the tail
    is the share of Σ σ² beyond the rank, relative to that at the measured rank; the depth factor
    falls from 1 + γ at the first block to 1 at the last. α and γ are those whose ranks diverge
    least in `trials` measurements of the whole model; 0 trials take them as given.

    Ranks are multiples of `multiple`, which fits a GPU's tiles; sites of small break-even ranks,
    where that leaves few options, may have any rank. What the program leaves of the budget, less
    than the step to the next option anywhere, stays unspent, as in the public code.
    """

    alpha: float = 0.0  # The paper's without a search.
    gamma: float = 5.0  # The same.
    trials: int = 0  # Of the search; the public code's are 10.
    reference: float = 0.1  # Of r*.
    lowest: float = 0.3  # Of r*: the smallest option. The paper's below a ratio of 0.5 is 0.1.
    highest: float = 0.95  # Of r*: options are below it.
    multiple: int = 8
    any_rank_below: int = 80  # Break-even ranks below it have steps of one.
    windows: int = 8  # Calibration windows of a measurement; 0: all. The public code takes 32.
    temperature: float = 0.6  # Of both predictions in the divergence.
    first_position: int = 256  # Of a window; in windows shorter than twice it, their second half.
    seed: int = 0  # Of the search.

    def __post_init__(self) -> None:
        check_at_least(0, alpha=self.alpha, gamma=self.gamma, trials=self.trials)
        check_at_least(0, windows=self.windows, first_position=self.first_position)
        check_at_least(1, multiple=self.multiple)
        if not 0 < self.lowest < self.highest <= 1 or not 0 < self.reference < 1:
            raise ConfigError(
                f"reference={self.reference:g}, lowest={self.lowest:g}, highest={self.highest:g}"
                " are shares of the break-even rank; lowest must be below highest"
            )
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature:g} is not above 0")

    @property
    def trial_windows(self) -> int:
        return self.windows

    @property
    def spends_rest(self) -> bool:
        return False

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("scipy", "optuna") if self.trials else ("scipy",)

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        options = {site: self._ranks(site, budget) for site in budget.shapes}
        self._check(options, budget)
        measured = self._predictions(objective)
        costs = {
            site: self._costs(site, options[site], spectra[site], budget, objective, measured)
            for site in track(options, len(options), "sensitivities", "site")
        }

        def ranks(alpha: float, gamma: float) -> dict[str, int]:
            factors = depth_factors(list(spectra), alpha, gamma)
            priced = {
                site: [
                    Option(rank, budget.costs[site].at(rank), cost * factors[site])
                    for rank, cost in found.items()
                ]
                for site, found in costs.items()
            }
            return cheapest_choice(priced, budget.limit)

        if not self.trials:
            return ranks(self.alpha, self.gamma)
        tried: dict[tuple[float, ...], dict[str, int]] = {}

        def divergence(found: list[float]) -> float:
            tried[tuple(found)] = ranks(*found)
            return objective.divergence(tried[tuple(found)], self.windows, measured)

        ranges = {"alpha": _ALPHA, "gamma": _GAMMA}
        alpha, gamma = best_parameters(divergence, ranges, self.trials, self.seed)
        log.info("LEMS: alpha %.3g and gamma %.3g diverge least", alpha, gamma)
        return tried[alpha, gamma]

    def _predictions(self, objective: CalibrationObjective) -> Predictions:
        """Return which predictions are compared."""
        first = self.first_position
        if objective.length < 2 * first:
            first = objective.length // 2
            log.info("windows of %d tokens: the divergence counts their second half", 2 * first)
        return Predictions(first, self.temperature)

    def _ranks(self, site: str, budget: Budget) -> list[int]:
        """Return the ranks that a site may have if it is not dense.

        Raises:
            ConfigError: there is none.
        """
        last = budget.costs[site].break_even_rank
        step = 1 if last < self.any_rank_below else self.multiple
        first = max(budget.floors[site], math.ceil(self.lowest * last))
        ranks = [rank for rank in range(first, last + 1) if rank % step == 0]
        kept = [rank for rank in ranks if rank < self.highest * last]
        if not kept and last >= first and step > 1:
            raise ConfigError(
                f"no multiple of {step} lies between {first}, the least rank of {site}, and"
                f" {self.highest * last:g}; set allocation.multiple=1"
                " or widen allocation.lowest and allocation.highest"
            )
        return kept

    def _check(self, options: Mapping[str, Sequence[int]], budget: Budget) -> None:
        """Raise BudgetError if the least ranks together cost more than there is."""
        full = budget.full_ranks
        least = budget.cost(
            {site: min(ranks, default=full[site]) for site, ranks in options.items()}
        )
        if least > budget.limit:
            raise BudgetError(
                f"ratio {budget.ratio:.10g} is below {least / budget.total:.4g}, what the smallest"
                " ranks of LEMS need; lower allocation.lowest"
            )

    def _costs(
        self,
        site: str,
        ranks: Sequence[int],
        spectrum: Spectrum,
        budget: Budget,
        objective: CalibrationObjective,
        measured: Predictions,
    ) -> dict[int, float]:
        """Return the cost of each option of a site, without its depth; dense is its full rank."""
        full = budget.shapes[site].full_rank
        if not ranks:
            return {full: 0.0}
        reference = max(1, int(self.reference * budget.costs[site].break_even_rank))
        energy = spectrum.sigma.double().square()
        kept = [0.0, *accumulate((energy / energy.sum()).tolist())]
        least = max(1 - kept[reference], _LEAST_TAIL)
        kl = objective.divergence({site: reference}, self.windows, measured)
        return {full: 0.0, **{rank: kl * max(0.0, 1 - kept[rank]) / least for rank in ranks}}


def depth_factors(sites: Sequence[str], alpha: float, gamma: float) -> dict[str, float]:
    """Return 1 + γ · norm(Σ_{k≥b} (k+1)^−α) for each site's block b; norm maps onto [0, 1].

    Sites outside the blocks, such as the head, have the factor 1 of the last block.
    """
    inside = [site for site in sites if layer_and_role(site)[1] != site]
    layers = sorted({layer_and_role(site)[0] for site in inside})
    if not layers:
        return dict.fromkeys(sites, 1.0)
    terms = [(k + 1) ** -alpha for k in range(len(layers))]
    sums = [sum(terms[b:]) for b in range(len(layers))]
    span = max(sums[0] - sums[-1], 1e-12)
    factors = {
        layer: 1 + gamma * (total - sums[-1]) / span
        for layer, total in zip(layers, sums, strict=True)
    }
    return dict.fromkeys(sites, 1.0) | {site: factors[layer_and_role(site)[0]] for site in inside}
