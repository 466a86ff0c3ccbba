"""LEMS: its program against exhaustive search, its costs against the formula (METHODS 11.2)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from test_method_allocations import flat

from iosvd.allocation import Lems
from iosvd.allocation.choice import Option, cheapest_choice
from iosvd.allocation.lems import depth_factors
from iosvd.allocation.objective import Predictions
from iosvd.budget import Budget, Shape
from iosvd.errors import BudgetError, ConfigError, NumericalError
from iosvd.target import budget_for_kl
from iosvd.types import Spectrum

SHAPES = {
    f"model.layers.{i}.{role}": shape
    for i in range(3)
    for role, shape in (("q_proj", Shape(40, 40)), ("up_proj", Shape(90, 40)))
}


@dataclass
class Measured:
    """Divergences that depend on how much is cut; it remembers what it was asked."""

    length: int = 512
    asked: list[tuple[dict[str, int], int, Predictions]] = field(default_factory=list)

    def divergence(self, ranks: Mapping[str, int], windows: int, predictions: Predictions) -> float:
        self.asked.append((dict(ranks), windows, predictions))
        return sum(0.1 * (1 + list(SHAPES).index(site)) / rank for site, rank in ranks.items())


def spectra() -> dict[str, Spectrum]:
    return {site: falling(0.8 + 0.03 * i, shape) for i, (site, shape) in enumerate(SHAPES.items())}


def falling(factor: float, shape: Shape) -> Spectrum:
    one = flat(1.0, shape)
    powers = factor ** torch.arange(shape.full_rank, dtype=torch.float64)
    return type(one)(**{**vars(one), "sigma": powers})


def exhaustive(options: Mapping[str, list[Option]], limit: int) -> float:
    costs = [
        sum(option.loss for option in chosen)
        for chosen in itertools.product(*options.values())
        if sum(option.bits for option in chosen) <= limit
    ]
    return min(costs)


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_exhaustive_search_finds(seed: int) -> None:
    draw = random.Random(seed)
    scale = 10.0 ** draw.randint(-9, 3)  # Divergences are small numbers.
    options = {
        f"s{site}": [
            Option(rank, 16 * draw.randint(1, 60), scale * draw.random())
            for rank in range(draw.randint(1, 6))
        ]
        for site in range(5)
    }
    least = sum(min(option.bits for option in found) for found in options.values())
    limit = least + 16 * draw.randint(0, 100)
    ranks = cheapest_choice(options, limit)
    chosen = [options[site][rank] for site, rank in ranks.items()]
    assert list(ranks) == list(options)
    assert sum(option.bits for option in chosen) <= limit
    assert sum(option.loss for option in chosen) == pytest.approx(
        exhaustive(options, limit), rel=2e-5
    )


def test_a_program_without_a_solution_is_an_error() -> None:
    with pytest.raises(NumericalError, match="integer program of the ranks has no solution"):
        cheapest_choice({"s": [Option(1, 32, 0.0)]}, 16)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 5.0), (1.0, 2.0), (3.0, 0.0)])
def test_depth_factors_fall_from_the_first_block_to_the_last(alpha: float, gamma: float) -> None:
    sites = [f"model.layers.{b}.q_proj" for b in range(4)]
    sums = [sum((k + 1) ** -alpha for k in range(b, 4)) for b in range(4)]
    expected = [1 + gamma * (s - sums[3]) / (sums[0] - sums[3]) for s in sums]
    assert list(depth_factors(sites, alpha, gamma).values()) == pytest.approx(expected)
    assert expected[0] == 1 + gamma
    assert expected[3] == 1


def test_one_block_has_no_depth() -> None:
    assert depth_factors(["model.layers.0.q_proj"], 1.0, 5.0) == {"model.layers.0.q_proj": 1.0}


@pytest.mark.parametrize("ratio", [0.45, 0.6, 0.8])
def test_ranks_have_the_least_cost_of_the_formula(ratio: float) -> None:
    """All choices of three sites are tried, with costs written out here."""
    shapes = dict(itertools.islice(SHAPES.items(), 3))
    found = {site: spectra()[site] for site in shapes}
    budget, measured = Budget(shapes, ratio), Measured()
    lems = Lems(lowest=0.1)
    ranks = lems(found, budget, measured)
    depth = {0: 6.0, 1: 1.0}  # Two blocks: γ = 5.
    options: dict[str, list[Option]] = {}
    for site, shape in shapes.items():
        last = (shape.m * shape.n - 1) // (shape.m + shape.n)
        energy = found[site].sigma ** 2
        reference = max(1, int(0.1 * last))
        kl = 0.1 * (1 + list(SHAPES).index(site)) / reference
        options[site] = [Option(shape.full_rank, 16 * shape.m * shape.n, 0.0)]
        for rank in range(1, last + 1):
            if 0.1 * last <= rank < 0.95 * last:
                tail = energy[rank:].sum() / energy[reference:].sum()
                loss = float(kl * tail) * depth[int(site.split(".")[2])]
                options[site].append(Option(rank, 16 * rank * (shape.m + shape.n), loss))
    chosen = [next(o for o in options[site] if o.rank == rank) for site, rank in ranks.items()]
    assert sum(option.bits for option in chosen) <= budget.limit
    least = exhaustive(options, budget.limit)
    assert sum(option.loss for option in chosen) == pytest.approx(least, rel=2e-5)
    asked = [asked for asked, _, _ in measured.asked]
    assert asked == [
        {s: max(1, int(0.1 * ((x.m * x.n - 1) // (x.m + x.n))))} for s, x in shapes.items()
    ]


def test_wide_sites_have_multiples_of_eight_and_narrow_ones_any_rank() -> None:
    up, q = "model.layers.0.up_proj", "model.layers.0.q_proj"  # Break-even ranks of 133 and 44.
    shapes = {up: Shape(400, 200), q: Shape(90, 90)}
    found = {site: falling(0.97, shape) for site, shape in shapes.items()}
    budgets = [Budget(shapes, ratio) for ratio in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75)]
    ranks = [Lems()(found, budget, Measured()) for budget in budgets]
    assert all(chosen[up] % 8 == 0 for chosen in ranks)
    assert any(chosen[q] % 8 for chosen in ranks)
    anywhere = [Lems(any_rank_below=200)(found, budget, Measured()) for budget in budgets]
    assert any(chosen[up] % 8 for chosen in anywhere)


@pytest.mark.parametrize(("length", "first"), [(2048, 256), (512, 256), (511, 255), (128, 64)])
def test_short_windows_count_their_second_half(length: int, first: int) -> None:
    measured = Measured(length=length)
    Lems(windows=3)(spectra(), Budget(SHAPES, 0.6), measured)
    assert {(windows, p) for _, windows, p in measured.asked} == {(3, Predictions(first, 0.6))}


def test_the_search_takes_the_depth_whose_ranks_diverge_least() -> None:
    """The measured model does not care for depth, so a small γ is best here."""

    class Whole(Measured):
        def divergence(
            self, ranks: Mapping[str, int], windows: int, predictions: Predictions
        ) -> float:
            if len(ranks) == 1:
                return 0.1
            dropped = [float((spectra()[s].sigma[r:] ** 2).sum()) for s, r in ranks.items()]
            self.asked.append((dict(ranks), windows, predictions))
            return sum(dropped)

    budget, measured = Budget(SHAPES, 0.6), Whole()
    searched = Lems(trials=6)(spectra(), budget, measured)
    tried = [ranks for ranks, _, _ in measured.asked]
    assert len(tried) == 6
    best = min(measured.divergence(ranks, 0, Predictions()) for ranks in tried)
    assert measured.divergence(searched, 0, Predictions()) == best
    assert Lems(trials=6)(spectra(), budget, Whole()) == searched


def test_impossible_options_are_one_line() -> None:
    with pytest.raises(ConfigError, match="no multiple of 50 lies between 6, the least rank of"):
        Lems(multiple=50, any_rank_below=1)(spectra(), Budget(SHAPES, 0.6), Measured())
    with pytest.raises(BudgetError, match=r"ratio 0\.2 is below 0\.\d+, what the smallest ranks"):
        Lems()(spectra(), Budget(SHAPES, 0.2), Measured())
    with pytest.raises(ConfigError, match="lowest must be below highest"):
        Lems(lowest=0.9, highest=0.8)
    with pytest.raises(ConfigError, match="temperature=0 is not above 0"):
        Lems(temperature=0.0)


def test_a_head_has_the_factor_of_the_last_block_and_rank_one_may_be_too_much() -> None:
    factors = depth_factors(["model.layers.0.q", "model.layers.1.q", "lm_head"], 0.0, 5.0)
    assert factors == {"model.layers.0.q": 6.0, "model.layers.1.q": 1.0, "lm_head": 1.0}
    assert depth_factors(["lm_head"], 0.0, 5.0) == {"lm_head": 1.0}
    shapes = {"model.layers.0.q": Shape(3, 3), "model.layers.0.up": Shape(40, 40)}
    found = {site: falling(0.9, shape) for site, shape in shapes.items()}

    class Small(Measured):
        def divergence(
            self, ranks: Mapping[str, int], windows: int, predictions: Predictions
        ) -> float:
            return 0.1

    ranks = Lems()(found, Budget(shapes, 0.8), Small())
    assert ranks["model.layers.0.q"] == 3  # Break-even is rank 1, which is not below 95 % of it.


def test_a_target_kl_is_met_above_the_least_ranks() -> None:
    found = {site: falling(0.7, shape) for site, shape in SHAPES.items()}
    whole, measured = Budget(SHAPES, 1.0), Measured()
    for target in (0.05, 1e6):
        budget = budget_for_kl(target, Lems(), found, whole, measured)
        ranks = Lems()(found, budget, measured)
        lost = sum(float((found[s].sigma[r:] ** 2).sum()) for s, r in ranks.items()) / 2
        assert lost <= target
