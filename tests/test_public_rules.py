"""The `_public` presets against re-implementations of the rules of the authors' code.

Written from the rules in docs/fidelity.md, with plain torch and without the project's statistics,
factorisation or allocation. The codes themselves were compared from outside on trained models.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import build
from test_method_allocations import LAYERS, SHAPES, Table, layered
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from iosvd.allocation import LayerImportance, Learned, SensitivitySearch
from iosvd.budget import Budget
from iosvd.correction import Randomized
from iosvd.correction.randomized import sketch
from iosvd.errors import ConfigError
from iosvd.layers.replacement import low_rank_layers
from iosvd.linalg import DiagonalRoot, IdentityRoot
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import Compressed, compress
from iosvd.presets import preset
from iosvd.types import Whitener

TOKENS = torch.randint(0, 31, (24, 16), generator=torch.Generator().manual_seed(4))


def compressed(method: str, ratio: float) -> Compressed:
    return compress(build("llama"), TOKENS, method=preset(method, ratio), ratio=ratio, batch_size=8)


def inputs_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return the inputs of each layer, (tokens, n)."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, x, name=name: seen[name].append(x[0].detach().flatten(0, 1))
        )
    with torch.no_grad():
        for window in TOKENS:
            model(input_ids=window[None])
    return {name: torch.cat(found) for name, found in seen.items()}


def truncated(weight: Tensor, root: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double() @ root.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root.double())


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.4])
def test_svd_llm_floors_every_rank_and_whitens_by_the_sum(ratio: float) -> None:
    """The Gram matrix is a sum, undamped, and the remainder of the budget is left."""
    dense = build("llama")
    sites = find_sites(dense, SiteSelection())
    weights = {name: site.weight.detach().clone() for name, site in sites.items()}
    seen = inputs_of(dense, list(sites))
    found = compressed("svd_llm_public", ratio)
    low_rank = low_rank_layers(found.model)
    for name, weight in weights.items():
        m, n = weight.shape
        rank = int(m * n * ratio / (m + n))
        assert found.plan.sites[name].rank == rank
        x = seen[name].double()
        expected = truncated(weight, torch.linalg.cholesky(x.T @ x), rank)
        assert_close(low_rank[name].product().detach().double(), expected, rtol=1e-3, atol=1e-4)
    assert found.plan.parameters_kept < ratio * found.plan.parameters_total


def zero_sum_ranks(changes: dict[str, list[float]], ratio: float) -> dict[str, int]:
    """Drop one component at a time, keeping the sum of changes near zero, until enough is gone."""
    shapes = {
        name: site.weight.shape
        for name, site in find_sites(build("llama"), SiteSelection()).items()
    }
    ranks = {name: len(change) for name, change in changes.items()}
    even = {name: max(1, (m * n - 1) // (m + n)) for name, (m, n) in shapes.items()}
    budget = sum(m * n for m, n in shapes.values()) * (1 - ratio)
    sides: tuple[list, list] = ([], [])  # Not negative, and negative changes.
    order = iter(range(10**6))

    def offer(name: str) -> None:
        if ranks[name] > 1:
            change = changes[name][ranks[name] - 1]
            heapq.heappush(sides[change < 0], (abs(change), next(order), name, change))

    for name in ranks:
        offer(name)
    removed, running = 0.0, 0.0
    while removed < budget:
        preferred = sides[0] if running <= 0 else sides[1]
        _, _, name, change = heapq.heappop(preferred or sides[0] or sides[1])
        ranks[name] -= 1
        running += change
        m, n = shapes[name]
        if ranks[name] == even[name]:
            removed += m * n - even[name] * (m + n)
        elif ranks[name] < even[name]:
            removed += m + n
        offer(name)
    return {name: ranks[name] if ranks[name] <= even[name] else min(shapes[name]) for name in ranks}


@pytest.mark.parametrize("ratio", [0.8, 0.6])
def test_zs_svd_damps_absolutely_and_takes_the_gradient_of_one_window(ratio: float) -> None:
    dense = build("llama")
    sites = find_sites(dense, SiteSelection())
    weights = {name: site.weight.detach().clone() for name, site in sites.items()}
    seen = inputs_of(dense, list(sites))
    logits = dense(input_ids=TOKENS[:1]).logits
    cross_entropy(logits[0, :-1], TOKENS[0, 1:]).backward()
    changes, roots = {}, {}
    for name, weight in weights.items():
        x, gradient = seen[name].double(), sites[name].weight.grad
        assert gradient is not None
        metric = x.T @ x / len(x) + 1e-4 * torch.eye(x.shape[1])
        roots[name] = torch.linalg.cholesky(metric)
        u, s, vh = torch.linalg.svd(weight.double() @ roots[name], full_matrices=False)
        h = gradient.double() @ torch.linalg.inv(roots[name]).T
        changes[name] = (-s * torch.einsum("mi,mn,in->i", u, h, vh)).tolist()
    found = compressed("zs_svd_public", ratio)
    ranks = {name: site.rank for name, site in found.plan.sites.items()}
    assert ranks == zero_sum_ranks(changes, ratio)
    for name, layer in low_rank_layers(found.model).items():
        expected = truncated(weights[name], roots[name], ranks[name])
        assert_close(layer.product().detach().double(), expected, rtol=1e-3, atol=1e-4)


def test_asvd_takes_a_sketch_without_oversampling() -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(30, generator=torch.Generator().manual_seed(2)) + 0.1
    whitener = Whitener(IdentityRoot(), DiagonalRoot(scale))
    torch.manual_seed(7)
    u, s, v = torch.svd_lowrank(weight * scale, q=9)
    torch.manual_seed(7)
    assert_close(sketch(weight, whitener, 9, 2).dense(), (u * s) @ v.T / scale)
    exact = truncated(weight, torch.diag(scale), 9)
    assert float((sketch(weight, whitener, 9, 2).dense() - exact).norm() / exact.norm()) > 0.01


def test_asvd_searches_the_ratios_it_is_given() -> None:
    losses = {
        (site, max(1, int(ratio * shape.entries / (shape.m + shape.n)))): 1 - ratio
        for site, shape in SHAPES.items()
        for ratio in (0.4, 0.7)
    }
    table = Table(losses)
    SensitivitySearch(ratios=[0.7, 0.4])({}, Budget(SHAPES, 0.6), table)
    assert len(table.asked) == 2 * len(SHAPES)
    with pytest.raises(ConfigError, match=r"ratios=\[0\.0\] must be shares in \(0, 1\)"):
        SensitivitySearch(ratios=[0.0])


def test_the_randomised_correction_is_a_sketch_of_every_truncated_site() -> None:
    """A sketch with enough power iterations is the exact truncation."""
    method = preset("svd_llm", 0.6)
    exact = compress(build("llama"), TOKENS, method=method, ratio=0.6).model
    many = replace(method, correction=Randomized(iterations=200))
    found = low_rank_layers(compress(build("llama"), TOKENS, method=many, ratio=0.6).model)
    for name, layer in low_rank_layers(exact).items():
        assert_close(found[name].product(), layer.product(), rtol=1e-3, atol=1e-3)
    few = replace(method, correction=Randomized())
    first, second = (
        low_rank_layers(compress(build("llama"), TOKENS, method=few, ratio=0.6).model)
        for _ in range(2)
    )
    for name, layer in first.items():  # Drawn by its own seed.
        assert torch.equal(second[name].left, layer.left), name


def dip_ratios(sensitivity: list[float], rank: list[float], ratio: float) -> Iterator[float]:
    """Four segments of depth, inverted, spread by 0.25, scaled and clipped to the whole ratio."""
    layers = len(sensitivity)
    cuts = [layers * i // 4 for i in range(5)]
    shares = []
    for first, last in itertools.pairwise(cuts):
        part = sensitivity[first:last]
        shares += [value / sum(part) for value in part]

    def unit(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(v - low) / (high - low) if high > low else 0.5 for v in values]

    inverse, negative = unit([1 / s for s in shares]), unit([-r for r in rank])
    score = unit([a**0.3 * b**0.7 for a, b in zip(inverse, negative, strict=True)])
    ratios = [ratio - 0.25 + 0.5 * value for value in score]
    for _ in range(25):
        scale = ratio * layers / sum(ratios)
        ratios = [min(max(scale * value, 0.3), 0.98) for value in ratios]
    yield from ratios


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_dip_svd_inverts_within_segments_and_clips(ratio: float) -> None:
    sensitivity, ranks = [1.0, 2.0, 3.0, 5.0], [10, 20, 40, 30]
    found = layered(sensitivity, ranks)
    allocation = preset("dip_svd_public", ratio).allocation
    assert isinstance(allocation, LayerImportance)
    chosen = allocation(found, Budget(SHAPES, ratio), Table())
    effective = [math.ceil(0.95 * r) / 40 for r in ranks]
    expected = list(dip_ratios(sensitivity, effective, ratio))
    assert len(expected) == LAYERS
    for site, shape in SHAPES.items():
        share = expected[int(site.split(".")[2])]
        exact = share * shape.m * shape.n / (shape.m + shape.n)
        dense = exact > (shape.m * shape.n - 1) // (shape.m + shape.n)
        assert dense or chosen[site] == pytest.approx(exact, abs=1.5)


def test_segments_change_what_is_compared_and_clip_bounds_it() -> None:
    found = layered([1.0, 2.0, 30.0, 40.0], [30, 20, 10, 15])
    whole, parts = (
        LayerImportance(inverted=True, segments=segments)(found, Budget(SHAPES, 0.6), Table())
        for segments in (1, 2)
    )
    assert whole != parts
    clipped = LayerImportance(spread=0.5, clip=[0.5, 0.7])(found, Budget(SHAPES, 0.6), Table())
    for site, shape in SHAPES.items():
        share = clipped[site] * (shape.m + shape.n) / (shape.m * shape.n)
        assert 0.5 - 0.06 < share < 0.7 + 0.06
    with pytest.raises(ConfigError, match=r"clip=\[0\.9, 0\.1\] is no range"):
        LayerImportance(clip=[0.9, 0.1])


def test_learned_positions_take_the_rate_of_a_cosine_and_the_perplexity() -> None:
    with pytest.raises(ConfigError, match=r"last_rate=-1\.0 is below 0"):
        Learned(last_rate=-1.0)
    method = preset("dobi_svd", 0.6)
    ranks = []
    for options in ({}, {"of_perplexity": True}, {"last_rate": 0.0}):
        allocation = Learned(steps=20, learning_rate=0.1, **options)  # type: ignore[arg-type]
        learned = replace(method, allocation=allocation)
        found = compress(build("llama"), TOKENS, method=learned, ratio=0.6)
        assert found.plan.parameters_kept <= 0.6 * found.plan.parameters_total
        ranks.append(found.plan.ranks)
    assert ranks[0] != ranks[1]
    assert ranks[0] != ranks[2]
