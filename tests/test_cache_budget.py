"""Bits of a cache count in the ratio beside the weights: keys and values get other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, divided
from torch import Tensor
from transformers import DynamicCache

import iosvd
from iosvd.allocation import Hull, LossAware, Spectral, Uniform, ZeroSum
from iosvd.budget import Budget, Shape, SiteCost
from iosvd.errors import ConfigError
from iosvd.inference.cache import held_bytes
from iosvd.layers.replacement import stored_bytes
from iosvd.runs.config import compose_run
from iosvd.runs.records import read_plan
from iosvd.sweeps.expansion import expand
from iosvd.types import Spectrum

TOKENS = torch.randint(0, 31, (8, 16), generator=torch.Generator().manual_seed(0))
CACHED = 40


def test_the_cost_of_a_cached_site_counts_every_entry() -> None:
    shapes = {"k_proj": Shape(6, 10, cached_width=6, cached_tokens=7), "o_proj": Shape(6, 10)}
    budget = Budget(shapes, 0.5)
    assert budget.total == 16 * (6 * 10 + 6 * 7 + 6 * 10)
    for rank in range(1, 7):
        factors = rank * (6 + 10)
        assert budget.costs["o_proj"].at(rank) == 16 * min(60, factors)
        assert budget.costs["k_proj"].at(rank) == 16 * min(60 + 42, factors + 7 * rank)
    # Factors that are larger than the weight pay off where the cache is what costs.
    assert budget.costs["o_proj"].break_even_rank == 3
    assert budget.costs["k_proj"].break_even_rank == 4
    assert SiteCost(100, 1, 10).with_cache(5, 0) == SiteCost(100, 1, 10)


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.4])
def test_weights_and_cache_are_within_the_ratio(ratio: float) -> None:
    model = build("llama")
    found = iosvd.compress(
        model, TOKENS, **divided({}), ratio=ratio, cache_tokens=CACHED, batch_size=4
    )
    prepared = iosvd.prepare_for_generation(model, "latent", "latent")
    cache = DynamicCache()
    prepared(input_ids=TOKENS[:4, :10], past_key_values=cache)  # 40 tokens.
    plan = found.plan
    # Of float32, which the budget counts as 16 bits.
    held = stored_bytes(prepared, plan.sites) + held_bytes(cache)
    assert held * 8 / 2 == plan.bits_kept <= ratio * plan.bits_total
    entries = {name: site.out_features * site.in_features for name, site in plan.sites.items()}
    cached = sum(s.out_features for n, s in plan.sites.items() if n.endswith(("k_proj", "v_proj")))
    assert plan.bits_total == 16 * (sum(entries.values()) + CACHED * cached)


def test_ranks_that_count_the_cache_lose_less_in_the_same_bytes() -> None:
    def plan(ratio: float, tokens: int) -> tuple[int, float]:
        """Return the bits of weights and a cache of 200 tokens, and the predicted loss."""
        found = iosvd.compress(
            build("llama"), TOKENS, **divided({}), ratio=ratio, cache_tokens=tokens, batch_size=4
        )
        sites = found.plan.sites.items()
        cached = sum(s.rank for n, s in sites if n.endswith(("k_proj", "v_proj")))
        weights = sum(s.bits for _, s in sites)
        return weights + 16 * 200 * cached, sum(s.dropped_energy for _, s in sites)

    bits, loss = plan(0.6, 200)
    others = [plan(percent / 100, 0) for percent in range(20, 96, 4)]
    fitting = [other for used, other in others if used <= bits]
    assert fitting
    assert loss < min(fitting)


SPECTRA: dict[str, Spectrum] = {}


def ranks_of(allocation: Any, ratio: float, tokens: int) -> tuple[Budget, dict[str, int]]:
    """Allocate on spectra of two blocks' shapes that fall off exponentially."""
    shapes = {}
    generator = torch.Generator().manual_seed(0)
    for name, m, n in (("q", 24, 24), ("k", 8, 24), ("v", 8, 24), ("up", 48, 24), ("down", 24, 48)):
        for layer in range(2):
            site = f"layers.{layer}.{name}_proj"
            cache = {"cached_width": m, "cached_tokens": tokens} if name in "kv" else {}
            shapes[site] = Shape(m, n, **cache)
            weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
            left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
            fall = torch.exp(-torch.arange(len(sigma)) / 4)
            SPECTRA[site] = a_spectrum(left, sigma * fall, right)
    budget = Budget(shapes, ratio)
    return budget, allocation(SPECTRA, budget, Unmeasured())


class Unmeasured:
    """An objective for allocations that measure nothing."""

    length = 16


def a_spectrum(left: Tensor, sigma: Tensor, right: Tensor) -> Spectrum:
    ones = torch.ones_like(sigma)
    return Spectrum(
        left=left * sigma,
        right=right,
        sigma=sigma,
        left_energy=ones,
        right_energy=ones,
        output_diagonal=torch.ones(len(left)),
        input_diagonal=torch.ones(right.shape[1]),
        damping_output=0.0,
        damping_input=0.0,
        loss_change=sigma * torch.cos(torch.arange(len(sigma))),
    )


def test_uniform_shares_are_those_of_weights_and_cache() -> None:
    budget, ranks = ranks_of(Uniform(), 0.6, 400)
    for site, cost in budget.costs.items():
        share = cost.at(ranks[site]) / cost.dense
        one = cost.component / cost.dense
        assert 0.6 - one <= share <= 0.6 + one, site


@pytest.mark.parametrize("allocation", [Spectral(), LossAware(), ZeroSum(), Hull()])
@pytest.mark.parametrize("tokens", [200, 2000])
def test_no_allocation_overshoots_where_components_differ_in_cost(
    allocation: Any, tokens: int
) -> None:
    budget, ranks = ranks_of(allocation, 0.5, tokens)
    rest = budget.limit - budget.cost(ranks)
    assert rest >= 0
    for site, price in budget.costs.items():
        rank = ranks[site]
        if rank < budget.shapes[site].full_rank:
            assert price.at(rank + 1) - price.at(rank) > rest, site


@pytest.mark.parametrize("tokens", [200, 2000])
def test_spectral_ranks_lose_little_more_than_the_convex_hull(tokens: int) -> None:
    lost = {}
    for allocation in (Spectral(), Hull()):
        budget, ranks = ranks_of(allocation, 0.5, tokens)
        lost[type(allocation)] = sum(
            float((SPECTRA[site].sigma[rank:] ** 2).sum())
            for site, rank in ranks.items()
            if budget.is_factorised(site, rank)
        )
    assert lost[Spectral] < 1.1 * lost[Hull]


def test_full_rank_is_dense_however_long_the_cache() -> None:
    """Also where outputs are wider than inputs, and a latent of full rank would be smaller."""
    budget = Budget({"k_proj": Shape(24, 8, cached_width=24, cached_tokens=10**6)}, 0.9)
    cost = budget.costs["k_proj"]
    assert cost.break_even_rank == 7
    assert not budget.is_factorised("k_proj", 8) and cost.at(8) == cost.dense
    model = build("llama")
    found = iosvd.compress(model, TOKENS, method="svd", ratio=0.95, cache_tokens=20000)
    assert found.plan.ratio_achieved <= 0.95


def test_spectra_are_kept_for_the_cache_that_is_asked_for() -> None:
    given = {**divided({}), "cache_tokens": CACHED, "batch_size": 4}
    spectra = iosvd.factorize(build("llama"), TOKENS, **given)
    found = [
        iosvd.compress(build("llama"), TOKENS, **given, ratio=0.9, factorized=known)
        for known in (spectra, None)
    ]
    assert found[0].plan.ranks == found[1].plan.ranks


def test_rows_that_count_a_cache_say_so() -> None:
    plain, cached = (
        expand(["method=io_svd,svd", "ratio=0.6", *more], sweep=True)
        for more in ([], ["cache_tokens=100"])
    )
    assert [run.label for run in plain] == ["io_svd", "svd"]
    assert [run.label for run in cached] == ["io_svd[cache_tokens=100]", "svd[cache_tokens=100]"]


def test_plans_of_earlier_versions_are_read(tmp_path: Path) -> None:
    found = iosvd.compress(build("llama"), TOKENS, **divided({}), ratio=0.6, batch_size=4)
    found.plan.write(tmp_path / "plan.json", {})
    plan = json.loads((tmp_path / "plan.json").read_text())
    for site in plan["sites"].values():
        assert site.pop("cache_bits") == 0
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert read_plan(tmp_path)["ratio_achieved"] == found.plan.ratio_achieved


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="cache_tokens needs quantization=none"):
        compose_run(["cache_tokens=100", "method=io_svd_plus"])
    with pytest.raises(ConfigError, match="cache_tokens=-1 is below 0"):
        compose_run(["cache_tokens=-1"])
    with pytest.raises(ConfigError, match=r"cache_tokens=1\.5 is not a whole number"):
        compose_run(["cache_tokens=1.5"])
    with pytest.raises(ConfigError, match="no site is called k_proj or v_proj"):
        iosvd.compress(build("gpt_neox"), TOKENS, **divided({}), ratio=0.6, cache_tokens=9)
