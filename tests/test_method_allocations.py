"""The published allocations against their rules, worked by hand or by literal loops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from test_hull import spectrum

from iosvd.allocation import LayerImportance, SensitivitySearch, TypeGrouped
from iosvd.allocation.layer_importance import Chosen
from iosvd.allocation.search import best_shares
from iosvd.allocation.shares import ranks_for_shares
from iosvd.allocation.type_grouped import Counted
from iosvd.budget import Budget, Shape
from iosvd.errors import ConfigError
from iosvd.types import Spectrum

LAYERS = 4
SHAPES = {
    f"model.layers.{i}.{role}": shape
    for i in range(LAYERS)
    for role, shape in (("q_proj", Shape(40, 40)), ("up_proj", Shape(90, 40)))
}


def flat(level: float, shape: Shape) -> Spectrum:
    return spectrum(torch.full((shape.full_rank,), level, dtype=torch.float64))


@dataclass
class Table:
    """Losses that a test writes down; it remembers what it was asked."""

    losses: Mapping[tuple[str, int], float] = field(default_factory=dict)
    tokens: int = 100
    asked: list[dict[str, int]] = field(default_factory=list)

    def loss(self, ranks: Mapping[str, int], windows: int) -> float:
        self.asked.append(dict(ranks))
        ((site, rank),) = ranks.items()
        return self.losses[site, rank]


@pytest.mark.parametrize("counted", list(Counted))
def test_type_grouped_is_the_formula_within_each_type(counted: Counted) -> None:
    budget = Budget(SHAPES, 0.6)
    levels = {site: 2.0 + 3 * i for i, site in enumerate(SHAPES)}
    found = {site: flat(levels[site], shape) for site, shape in SHAPES.items()}
    ranks = TypeGrouped(counted)(found, budget, Table(tokens=100))
    for role in ("q_proj", "up_proj"):
        group = [site for site in SHAPES if site.endswith(role)]
        shape = SHAPES[group[0]]
        uniform = 0.6 * shape.m * shape.n / (shape.m + shape.n)
        inverse = {}
        for site in group:
            # Σ over the dropped of σ² is a count times the level squared, per token.
            norm = math.sqrt(100 * (shape.full_rank - round(uniform)) * levels[site] ** 2)
            inverse[site] = 1 / math.log(norm)
        for site in group:
            part = len(group) * inverse[site] / sum(inverse.values())
            share = 0.6 * part if counted is Counted.kept else 1 - 0.4 * part
            expected = share * shape.m * shape.n / (shape.m + shape.n)
            assert ranks[site] == pytest.approx(expected, abs=1.5)


def test_a_larger_loss_is_compressed_less() -> None:
    found = {site: flat(3.0, shape) for site, shape in SHAPES.items()}
    found["model.layers.2.q_proj"] = flat(300.0, SHAPES["model.layers.2.q_proj"])
    ranks = TypeGrouped()(found, Budget(SHAPES, 0.6), Table())
    assert ranks["model.layers.2.q_proj"] > ranks["model.layers.0.q_proj"]
    literal = TypeGrouped(Counted.kept)(found, Budget(SHAPES, 0.6), Table())
    assert literal["model.layers.2.q_proj"] < literal["model.layers.0.q_proj"]


def layered(sensitivity: list[float], ranks: list[int]) -> dict[str, Spectrum]:
    """Layers of a known Fisher norm, whose sites have so many equal σ and the rest zero."""
    found = {}
    for site, shape in SHAPES.items():
        layer = int(site.split(".")[2])
        sigma = torch.zeros(shape.full_rank, dtype=torch.float64)
        sigma[: ranks[layer]] = 1.0
        found[site] = replace(spectrum(sigma), fisher_norm=sensitivity[layer] / 2)
    return found


def test_layer_importance_by_hand() -> None:
    """β = 0.5, so that importance is the geometric mean of the two scaled measures."""
    found = layered([1.0, 2.0, 3.0, 5.0], [10, 20, 40, 30])
    budget, spread = Budget(SHAPES, 0.6), 0.2
    ranks = LayerImportance(beta=0.5, spread=spread)(found, budget, Table())
    # 95 % of the sum of r equal σ is reached by ⌈0.95 r⌉ of 40.
    effective = [math.ceil(0.95 * r) / 40 for r in (10, 20, 40, 30)]
    s = [0.0, 0.25, 0.5, 1.0]
    r = [(e - min(effective)) / (max(effective) - min(effective)) for e in effective]
    importance = [math.sqrt(a * b) for a, b in zip(s, r, strict=True)]
    top = max(importance)
    shares = [0.6 + spread * (2 * value / top - 1) for value in importance]
    scale = 0.6 / (sum(shares) / LAYERS)
    for site, shape in SHAPES.items():
        share = scale * shares[int(site.split(".")[2])]
        assert ranks[site] == pytest.approx(
            share * shape.m * shape.n / (shape.m + shape.n), abs=1.5
        )


def test_inverted_importance_keeps_more_where_less_matters() -> None:
    found = layered([1.0, 2.0, 3.0, 5.0], [10, 20, 40, 30])
    site = {i: f"model.layers.{i}.q_proj" for i in (0, 3)}
    paper = LayerImportance()(found, Budget(SHAPES, 0.6), Table())
    code = LayerImportance(inverted=True)(found, Budget(SHAPES, 0.6), Table())
    assert paper[site[3]] > paper[site[0]]
    assert code[site[3]] < code[site[0]]


def test_layer_importance_without_the_fisher_says_so() -> None:
    found = {site: flat(1.0, shape) for site, shape in SHAPES.items()}
    with pytest.raises(ConfigError, match="no fisher_norm; factorize with the allocation"):
        LayerImportance()(found, Budget(SHAPES, 0.6), Table())


def test_the_search_finds_the_layer_that_matters() -> None:
    """A quadratic loss with its least value at known offsets."""
    wanted = [0.15, -0.1, 0.05, -0.1]

    def loss(offsets: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(offsets, wanted, strict=True))

    start = [0.0, 0.1, 0.0, 0.1]
    found = best_shares(loss, start=start, spread=0.2, trials=80, seed=0)
    assert loss(found) < 0.3 * min(loss(start), loss([0.0] * 4))
    assert all(abs(value) <= 0.2 for value in found)
    # The first two trials are the start, and equal ratios, which are better here.
    assert best_shares(loss, start=start, spread=0.2, trials=1, seed=0) == start
    assert best_shares(loss, start=start, spread=0.2, trials=2, seed=0) == [0.0] * 4
    again = best_shares(loss, start=start, spread=0.2, trials=80, seed=0)
    assert again == found


def test_the_searched_ranks_are_no_worse_than_the_heuristic_on_the_trial() -> None:
    found = layered([1.0, 2.0, 3.0, 5.0], [10, 20, 40, 30])
    budget = Budget(SHAPES, 0.6)

    class Rank:
        tokens = 100

        def loss(self, ranks: Mapping[str, int], windows: int) -> float:
            return sum((ranks[site] - 12) ** 2 for site in ranks if site.endswith("q_proj"))

    heuristic = LayerImportance()(found, budget, Rank())
    searched = LayerImportance(chosen=Chosen.search, trials=30)(found, budget, Rank())
    assert Rank().loss(searched, 0) < Rank().loss(heuristic, 0)


def literal_asvd(losses: dict[tuple[str, float], float], ratio: float) -> dict[str, float]:
    """Lower the bar from the largest measured loss on, as long as the budget allows it."""
    total = sum(shape.entries for shape in SHAPES.values())
    for threshold in sorted(set(losses.values())):
        shares = {}
        for site in SHAPES:
            allowed = [r for (s, r), loss in losses.items() if s == site and loss <= threshold]
            shares[site] = min(allowed, default=1.0)
        kept = 0
        for site, share in shares.items():
            m, n = SHAPES[site].m, SHAPES[site].n
            kept += m * n if share == 1.0 else int(share * m * n / (m + n)) * (m + n)
        if kept <= ratio * total:
            return shares
    raise AssertionError("not reached")


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_sensitivity_search_is_the_smallest_threshold_that_fits(ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses, by_rank = {}, {}
    for site, shape in SHAPES.items():
        falling = torch.rand(9, generator=generator).sort(descending=True).values.tolist()
        for tenth, loss in enumerate(falling, start=1):
            rank = int(tenth / 10 * shape.m * shape.n / (shape.m + shape.n))
            losses[site, tenth / 10] = by_rank[site, rank] = loss
    found = {site: flat(1.0, shape) for site, shape in SHAPES.items()}
    trial = Table(by_rank)
    ranks = SensitivitySearch()(found, Budget(SHAPES, ratio), trial)
    assert len(trial.asked) == 9 * len(SHAPES)
    expected = literal_asvd(losses, ratio)
    # Beyond the rule, only what the steps of 0.1 left of the budget is spent.
    assert ranks == ranks_for_shares(expected, Budget(SHAPES, ratio))


def test_shares_are_scaled_down_alike_where_they_overspend() -> None:
    budget = Budget(SHAPES, 0.4)
    ranks = ranks_for_shares({s: 0.9 if "q_proj" in s else 0.45 for s in SHAPES}, budget)
    for layer in range(LAYERS):
        q, up = (f"model.layers.{layer}.{role}" for role in ("q_proj", "up_proj"))
        shares = [ranks[s] * SHAPES[s].entries_at(1) / SHAPES[s].entries for s in (q, up)]
        assert shares[0] / shares[1] == pytest.approx(2, rel=0.15)
    assert budget.cost(ranks) <= budget.limit
