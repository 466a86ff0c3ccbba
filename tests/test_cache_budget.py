"""Bits of a cache count in the ratio beside the weights: keys and values get other ranks."""

from __future__ import annotations

import pytest
import torch
from conftest import build, divided
from transformers import DynamicCache

import iosvd
from iosvd.allocation import Uniform
from iosvd.budget import Budget, Shape, SiteCost
from iosvd.errors import ConfigError
from iosvd.inference.cache import held_bytes
from iosvd.layers.replacement import stored_bytes
from iosvd.runs.config import compose_run

TOKENS = torch.randint(0, 31, (8, 16), generator=torch.Generator().manual_seed(0))
CACHED = 40


def test_the_cost_of_a_cached_site_counts_every_entry() -> None:
    shapes = {"k_proj": Shape(6, 10, cached_tokens=7), "o_proj": Shape(6, 10)}
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


def test_every_method_can_plan_a_cache() -> None:
    allocation = divided({"allocation": Uniform()})
    found = iosvd.compress(
        build("qwen2"), TOKENS, **allocation, ratio=0.6, cache_tokens=CACHED, batch_size=4
    )
    assert found.plan.ratio_achieved <= 0.6


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="cache_tokens needs quantization=none"):
        compose_run(["cache_tokens=100", "method=io_svd_plus"])
    with pytest.raises(ConfigError, match="cache_tokens=-1 is below 0"):
        compose_run(["cache_tokens=-1"])
    with pytest.raises(ConfigError, match=r"cache_tokens=1\.5 is not a whole number"):
        compose_run(["cache_tokens=1.5"])
    with pytest.raises(ConfigError, match="no site is called k_proj or v_proj"):
        iosvd.compress(build("gpt_neox"), TOKENS, **divided({}), ratio=0.6, cache_tokens=9)
