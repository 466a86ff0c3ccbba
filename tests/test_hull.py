"""The convex-hull allocation against exhaustive search, the greedy rule, and a bound by duality."""

from __future__ import annotations

import pytest
import torch
from test_allocation import SHAPES, PredictedTrial, allocate

from iosvd.allocation import Hull, Spectral
from iosvd.budget import Budget, Shape
from iosvd.factorization import dropped_energy
from iosvd.types import Spectrum

EMPTY = torch.zeros(0)


def spectrum(sigma: torch.Tensor) -> Spectrum:
    """A spectrum of which an allocation by energy sees nothing but σ."""
    return Spectrum(EMPTY, EMPTY, sigma, EMPTY, EMPTY, EMPTY, EMPTY, 0.0, 0.0)


def random_spectra(shapes: dict[str, Shape], seed: int) -> dict[str, Spectrum]:
    """Spectra of unlike scale and decay."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        decay, scale = torch.rand(2, generator=generator).tolist()
        steps = torch.rand(shape.full_rank, generator=generator, dtype=torch.float64)
        found[name] = spectrum(10 ** (scale - (0.5 + decay) * steps.cumsum(0) / 2))
    return found


def exact_optimum(shapes: dict[str, Shape], spectra: dict[str, Spectrum], budget: Budget) -> float:
    """Least ½ Σ σ² over all choices of ranks, by dynamic programming over parameters."""
    limit = budget.limit // 16
    best = [0.0] * (limit + 1)
    for name, shape in shapes.items():
        tails = (spectra[name].sigma.square().flip(0).cumsum(0).flip(0) / 2).tolist()
        ranks = range(1, (shape.m * shape.n - 1) // (shape.m + shape.n) + 1)
        choices = [(k * (shape.m + shape.n), tails[k]) for k in ranks]
        choices.append((shape.m * shape.n, 0.0))
        best = [
            min((best[c - cost] + loss for cost, loss in choices if cost <= c), default=torch.inf)
            for c in range(limit + 1)
        ]
    return best[limit]


def loss(spectra: dict[str, Spectrum], ranks: dict[str, int], budget: Budget) -> float:
    return dropped_energy(ranks, spectra, budget) / 2


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_near_the_exact_optimum_and_never_behind_greedy(ratio: float, seed: int) -> None:
    """On a problem this small one component is much; half of it is the most that may be lost."""
    found, budget = random_spectra(SHAPES, seed), Budget(SHAPES, ratio)
    best = exact_optimum(SHAPES, found, budget)
    hull = loss(found, allocate(Hull(exponent=1.0), found, budget), budget)
    greedy = loss(found, allocate(Spectral(), found, budget), budget)
    assert best * (1 - 1e-9) <= hull <= 1.5 * best + 1e-12
    assert hull <= greedy * (1 + 1e-9)


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_with_many_sites_it_is_at_the_bound_of_the_relaxation(ratio: float) -> None:
    """Weak duality: for any price of a bit, Σ min(loss + price · cost) − price · limit <= best."""
    shapes = {f"layers.{i}.site": Shape(24, 24 if i % 2 else 60) for i in range(40)}
    found, budget = random_spectra(shapes, 0), Budget(shapes, ratio)
    ranks = Hull(exponent=1.0)(found, budget, PredictedTrial(found, budget))
    reached, bound = loss(found, ranks, budget), 0.0
    for price in torch.logspace(-12, 0, 2000, dtype=torch.float64).tolist():
        total = 0.0
        for name in shapes:
            tails = (found[name].sigma.square().flip(0).cumsum(0).flip(0) / 2).tolist()
            cost = budget.costs[name]
            total += min(
                price * cost.dense,
                *(tails[k] + price * cost.at(k) for k in range(1, cost.break_even_rank + 1)),
            )
        bound = max(bound, total - price * budget.limit)
    assert bound <= reached * (1 + 1e-9)
    assert reached <= 1.03 * bound


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_with_exponent_zero_it_is_the_greedy_rule_where_no_site_is_dense(ratio: float) -> None:
    """Spectra that end far below the break-even rank, and so no bargain in staying dense."""
    shapes = {f"layers.{i}.site": Shape(200, 20 + 20 * i) for i in range(5)}
    found = {}
    for name, shape in shapes.items():
        energetic = shape.full_rank // 4
        sigma = torch.zeros(shape.full_rank, dtype=torch.float64)
        sigma[:energetic] = torch.linspace(3, 1, energetic)
        found[name] = spectrum(sigma)
    budget = Budget(shapes, ratio / 5)
    hull = Hull(exponent=0.0)(found, budget, PredictedTrial(found, budget))
    greedy = Spectral()(found, budget, PredictedTrial(found, budget))
    assert max(abs(hull[name] - greedy[name]) for name in shapes) <= 1


def test_smaller_exponents_spare_the_sites_of_dear_components() -> None:
    shapes = {"layers.0.small": Shape(30, 30), "layers.0.large": Shape(300, 30)}
    sigma = 10 ** torch.linspace(0, -1, 30, dtype=torch.float64)
    found = {name: spectrum(sigma) for name in shapes}
    budget = Budget(shapes, 0.2)
    ranks = [allocate(Hull(exponent=e), found, budget)["layers.0.large"] for e in (0.0, 0.5, 1.0)]
    assert ranks[0] >= ranks[1] >= ranks[2] and ranks[0] > ranks[2]
