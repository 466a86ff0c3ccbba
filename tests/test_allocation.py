"""Budgets are met, exactly counted, and the greedy rule is the rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from conftest import all_variants, random_statistics
from torch import Tensor

import iosvd.allocation
from iosvd.allocation import Allocation, Lems, LossAware, Spectral, Uniform, ZeroSum
from iosvd.allocation.greedy import drop_cheapest
from iosvd.allocation.objective import Predictions
from iosvd.budget import Budget, Shape, sixteen_bits
from iosvd.errors import BudgetError
from iosvd.factorization import Factorization, dropped_energy
from iosvd.plan import make_plan
from iosvd.scoring import with_fisher_norm, with_loss_change
from iosvd.types import Spectrum
from iosvd.whitening import InputOutput

SHAPES = {"q": Shape(16, 16), "k": Shape(8, 16), "up": Shape(40, 16), "down": Shape(16, 40)}
TOTAL = 16 * 16 + 8 * 16 + 2 * 40 * 16
FLOOR = 32 + 24 + 2 * 56
RATIOS = [0.11, 0.15, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9, 0.97, 0.999, 1.0]
allocations = pytest.mark.parametrize("allocation", all_variants(iosvd.allocation))


def spectra() -> dict[str, Spectrum]:
    found = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        weight, statistics = random_statistics(shape.m, shape.n, seed)
        spectrum = Factorization()(weight, InputOutput()(statistics), name)
        assert statistics.gradient is not None and statistics.fisher_rows is not None
        scored = with_loss_change(spectrum, statistics.gradient)
        found[name] = with_fisher_norm(scored, weight, statistics.fisher_rows)
    return found


@dataclass(frozen=True)
class PredictedTrial:
    """A calibration set whose loss is what the spectra predict."""

    spectra: Mapping[str, Spectrum]
    budget: Budget
    tokens: int = 10**6
    windows: int = 4
    length: int = 512

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        lost = []
        for name, gate in gates.items():
            sigma = self.spectra[name].sigma.float()
            lost += [(sigma[: len(gate)] * (1 - gate)).square().sum(), *sigma[len(gate) :].square()]
        return torch.stack(lost).sum() / 2

    def component_derivatives(self, counts: Mapping[str, int], chosen: Tensor) -> dict[str, Tensor]:
        return {n: self.spectra[n].sigma[:count].float() ** 2 for n, count in counts.items()}

    def loss(self, ranks: Mapping[str, int], windows: int) -> float:
        full = {name: shape.full_rank for name, shape in self.budget.shapes.items()}
        return dropped_energy({**full, **ranks}, self.spectra, self.budget) / 2

    def divergence(self, ranks: Mapping[str, int], windows: int, predictions: Predictions) -> float:
        return self.loss(ranks, windows)


def of_any_rank(allocation: type[Allocation]) -> Allocation:
    """The allocation, whose least rank is one."""
    return allocation(lowest=0.01) if allocation is Lems else allocation()  # type: ignore[call-arg]


def allocate(
    allocation: Allocation, found: Mapping[str, Spectrum], budget: Budget
) -> dict[str, int]:
    return allocation(found, budget, PredictedTrial(found, budget))


@pytest.mark.parametrize(("m", "n"), [(16, 16), (8, 16), (40, 16), (7, 13), (1, 5), (4096, 11008)])
def test_break_even_is_the_last_rank_cheaper_than_dense(m: int, n: int) -> None:
    cost = sixteen_bits(Shape(m, n))
    assert cost.break_even_rank * (m + n) < m * n <= (cost.break_even_rank + 1) * (m + n)
    assert cost.at(cost.break_even_rank + 1) == 16 * m * n
    assert cost.at(min(m, n)) == 16 * m * n


@allocations
@pytest.mark.parametrize("ratio", RATIOS)
def test_budget_is_met_within_one_component(allocation: type[Allocation], ratio: float) -> None:
    budget = Budget(SHAPES, ratio)
    found = spectra()
    plan = make_plan(allocate(of_any_rank(allocation), found, budget), found, budget, kl=True)
    stored = sum(
        shape.m * shape.n if plan.sites[name].dense else plan.sites[name].rank * (shape.m + shape.n)
        for name, shape in SHAPES.items()
    )
    assert plan.parameters_kept == stored
    assert plan.parameters_total == TOTAL
    assert stored <= ratio * TOTAL
    floor = all(site.rank == 1 for site in plan.sites.values())
    assert (
        floor
        or not allocation().spends_rest
        or ratio * TOTAL - stored < max(shape.m + shape.n for shape in SHAPES.values())
    )
    assert all(site.rank >= 1 for site in plan.sites.values())


@allocations
@pytest.mark.parametrize("fraction", [0.1, 0.3])
@pytest.mark.parametrize("ratio", [0.45, 0.6, 0.8])
def test_no_site_goes_below_its_floor(
    allocation: type[Allocation], ratio: float, fraction: float
) -> None:
    budget = Budget(SHAPES, ratio, min_rank_fraction=fraction)
    ranks = allocate(of_any_rank(allocation), spectra(), budget)
    for name, shape in SHAPES.items():
        assert ranks[name] >= fraction * ((shape.m * shape.n - 1) // (shape.m + shape.n))
    assert budget.cost(ranks) <= budget.limit


def test_a_floor_above_the_budget_says_how_low_it_may_go() -> None:
    message = r"ratio 0\.3 is below (0\.\d+), what min_rank_fraction=0\.5 at every one of the 4"
    with pytest.raises(BudgetError, match=message) as error:
        Budget(SHAPES, 0.3, min_rank_fraction=0.5)
    stated = float(str(error.value).split("below ")[1].split(",")[0])
    Budget(SHAPES, stated, min_rank_fraction=0.5)
    with pytest.raises(BudgetError):
        Budget(SHAPES, stated - 0.001, min_rank_fraction=0.5)


@allocations
def test_ratio_one_keeps_every_site_dense(allocation: type[Allocation]) -> None:
    found, budget = spectra(), Budget(SHAPES, 1.0)
    plan = make_plan(allocate(of_any_rank(allocation), found, budget), found, budget, kl=True)
    assert plan.ranks == {}
    assert plan.ratio_achieved == 1
    assert plan.predicted_kl == 0


def test_smallest_feasible_ratio_is_stated_and_feasible() -> None:
    with pytest.raises(BudgetError, match=r"ratio 0\.05 is below (0\.\d+).*4 sites") as error:
        Budget(SHAPES, 0.05)
    stated = float(str(error.value).split("below ")[1].split(",")[0])
    budget = Budget(SHAPES, stated)
    assert FLOOR <= budget.limit / 16 < FLOOR + 0.001 * TOTAL
    assert allocate(Spectral(), spectra(), budget) == dict.fromkeys(SHAPES, 1)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_ratio_outside_its_range_is_an_error(ratio: float) -> None:
    with pytest.raises(BudgetError, match=r"outside \(0, 1\]"):
        Budget(SHAPES, ratio)


def test_limit_does_not_suffer_from_rounding() -> None:
    # 0.29 * 1600 is 463.99999999999994.
    assert Budget({"x": Shape(10, 10)}, 0.29).limit == 16 * 29


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_uniform_gives_every_site_the_formula_or_one_more(ratio: float) -> None:
    ranks = allocate(Uniform(), spectra(), Budget(SHAPES, ratio))
    for name, shape in SHAPES.items():
        formula = int(ratio * shape.m * shape.n / (shape.m + shape.n))
        assert ranks[name] in (formula, formula + 1)


def literal_greedy(costs: dict[str, list[float]], budget: Budget) -> dict[str, int]:
    """The rule as METHODS 5 words it: look at every site, drop the cheapest offer, repeat."""
    ranks = {name: len(values) for name, values in costs.items()}

    def parameters() -> int:
        return sum(min(s.m * s.n, ranks[name] * (s.m + s.n)) for name, s in budget.shapes.items())

    while parameters() > budget.ratio * TOTAL:
        open_sites = [name for name in ranks if ranks[name] > 1]
        ranks[min(open_sites, key=lambda name: costs[name][ranks[name] - 1])] -= 1
    return ranks


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_the_literal_rule(ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = {n: torch.rand(s.full_rank, generator=generator) for n, s in SHAPES.items()}
    expected = literal_greedy({n: c.tolist() for n, c in costs.items()}, Budget(SHAPES, ratio))
    assert drop_cheapest(costs, Budget(SHAPES, ratio)) == expected


def test_loss_aware_ignores_the_sign_of_the_change() -> None:
    found, budget = spectra(), Budget(SHAPES, 0.5)
    costs = {n: s.loss_change.abs().tolist() for n, s in found.items()}  # type: ignore[union-attr]
    assert allocate(LossAware(), found, budget) == literal_greedy(costs, budget)
    per = {n: [v / (SHAPES[n].m + SHAPES[n].n) for v in c] for n, c in costs.items()}
    by_parameter = allocate(LossAware(per_parameter=True), found, budget)
    assert by_parameter == literal_greedy(per, budget)


def literal_zero_sum(changes: dict[str, list[float]], budget: Budget) -> dict[str, int]:
    """METHODS 5 as worded: of the offers with the wanted sign the smallest |ΔL|, else the other."""
    ranks, total = {name: len(values) for name, values in changes.items()}, 0.0
    while sum(min(s.m * s.n, ranks[n] * (s.m + s.n)) for n, s in SHAPES.items()) > (
        budget.ratio * TOTAL
    ):
        offers = {n: changes[n][rank - 1] for n, rank in ranks.items() if rank > 1}
        wanted = {n: x for n, x in offers.items() if (x > 0) == (total <= 0)} or offers
        site = min(wanted, key=lambda n: abs(offers[n]))
        total += changes[site][ranks[site] - 1]
        ranks[site] -= 1
    return ranks


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_zero_sum_is_the_literal_rule(ratio: float) -> None:
    found, budget = spectra(), Budget(SHAPES, ratio)
    changes = {n: s.loss_change.tolist() for n, s in found.items()}  # type: ignore[union-attr]
    assert allocate(ZeroSum(), found, budget) == literal_zero_sum(changes, budget)


def test_zero_sum_lets_the_changes_cancel() -> None:
    """In absolute value far less than what dropping the smallest changes adds up to."""
    found, budget = spectra(), Budget(SHAPES, 0.5)

    def predicted(allocation: Allocation) -> float:
        plan = make_plan(allocate(allocation, found, budget), found, budget, kl=True)
        return abs(sum(site.loss_change or 0.0 for site in plan.sites.values()))

    assert predicted(ZeroSum()) < predicted(LossAware()) / 2


def test_spectral_drops_the_smallest_predicted_kl() -> None:
    found, budget = spectra(), Budget(SHAPES, 0.5)
    squares = {n: (s.sigma**2 / 2).tolist() for n, s in found.items()}
    assert allocate(Spectral(), found, budget) == literal_greedy(squares, budget)
    # One component of a larger site saves more parameters.
    per = {n: [v / (SHAPES[n].m + SHAPES[n].n) for v in c] for n, c in squares.items()}
    assert allocate(Spectral(per_parameter=True), found, budget) == literal_greedy(per, budget)


def test_plan_counts_what_is_dropped() -> None:
    found, budget = spectra(), Budget(SHAPES, 0.5)
    plan = make_plan(allocate(Spectral(), found, budget), found, budget, kl=True)
    dropped = {n: float((found[n].sigma[r:] ** 2).sum()) for n, r in plan.ranks.items()}
    assert dropped
    for name, site in plan.sites.items():
        assert site.dropped_energy == pytest.approx(dropped.get(name, 0.0))
    assert plan.predicted_kl == pytest.approx(sum(dropped.values()) / 2)
    assert (
        make_plan(plan.ranks | dict.fromkeys(SHAPES, 1), found, budget, kl=False).predicted_kl
        is None
    )
