"""Schemes use their budgets to within a row, choose the rows they say, predict what they do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checkpoints import TOKENS, compressed
from conftest import FAMILIES, all_variants, build
from torch import Tensor

import iosvd.quantization
from iosvd.allocation import Uniform
from iosvd.budget import Budget, Shape
from iosvd.errors import BudgetError, ConfigError, NumericalError
from iosvd.layers.int8 import Code
from iosvd.layers.replacement import compressed_layers, low_rank_layers, stored_bytes
from iosvd.method import Method
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import Compressed, compress
from iosvd.quantization import (
    Axis,
    Half,
    LossAwareRemap,
    NoQuantization,
    Quantization,
    RankBudget,
    Remap,
    RoundToNearest,
    Score,
)
from iosvd.whitening import Identity

SHAPES = {"q": Shape(16, 16), "k": Shape(8, 16), "up": Shape(40, 16), "down": Shape(16, 40)}


def run(
    quantization: Quantization,
    ratio: float = 0.6,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
) -> Compressed:
    return compressed(family, dtype, quantization, ratio)


def variants() -> list[Quantization]:
    """Every scheme as it is by default, and with every axis, code and row score."""
    found: list[Quantization] = []
    for cls in all_variants(iosvd.quantization):
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        found.append(cls())
        found += [cls(axis=axis) for axis in Axis if "axis" in names]
        found += [cls(code=code) for code in Code if "code" in names]
        found += [cls(score=score) for score in Score if "score" in names]
    searched = LossAwareRemap(rank_budget=RankBudget.search)
    fixed = LossAwareRemap(rank_budget=RankBudget.fixed, rank_ratio=0.7)
    return [*found, searched, fixed, RoundToNearest(group=8)]


def test_every_scheme_is_tried() -> None:
    assert {type(q) for q in variants()} == set(all_variants(iosvd.quantization))


@pytest.mark.parametrize("quantization", variants(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_what_the_plan_says_and_within_the_budget(
    quantization: Quantization, dtype: torch.dtype
) -> None:
    result = run(quantization, 0.6, dtype=dtype)
    plan = result.plan
    assert plan.bits_kept <= 0.6 * plan.bits_total
    held = 8 * stored_bytes(result.model, plan.sites)
    if isinstance(quantization, NoQuantization) and dtype == torch.float32:
        held //= 2  # Entries count as 16 bits; these were asked for in 32.
    assert held == plan.bits_kept == sum(site.bits for site in plan.sites.values())
    with torch.no_grad():
        assert torch.isfinite(result.model(input_ids=TOKENS).logits).all()


@pytest.mark.parametrize(
    ("score", "family"),
    [
        *((Score.second_order, f) for f in FAMILIES),
        (Score.absolute, "qwen2"),
        (Score.signed, "opt"),
    ],
)
@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
def test_loss_aware_uses_its_budget_up_to_one_row(
    score: Score, axis: Axis, ratio: float, family: str
) -> None:
    result = run(LossAwareRemap(score, axis), ratio, family)
    plan = result.plan
    free = ratio * plan.bits_total - plan.bits_kept
    mixed = any(name.endswith("order") for name in result.model.state_dict())
    longest = max(max(s.in_features, s.out_features) for s in plan.sites.values())
    # With nothing mixed, what is left has no room for a row and the order that it would need;
    # or all rows are in int8, and no component more fits.
    row, order = 8 * longest, 16 * longest
    component = max(8 * (s.in_features + s.out_features) + 32 for s in plan.sites.values())
    assert 0 <= free < (row if mixed else max(row + order, component))


@pytest.mark.parametrize("ratio", [0.3, 0.4, 0.6])
@pytest.mark.parametrize("quantization", [Half(), Half(Axis.channel), Half(Axis.output), Remap()])
def test_ranks_are_planned_with_what_rows_take(quantization: Quantization, ratio: float) -> None:
    """The cost that ranks are planned with is what is stored, to the bit."""
    plan = run(quantization, ratio).plan
    for site in plan.sites.values():
        cost = quantization.cost(Shape(site.out_features, site.in_features))
        assert site.bits == cost.at(site.rank)
        assert site.dense == (cost.at(site.rank) == cost.dense)
    whole = sum(quantization.cost(Shape(s.out_features, s.in_features)).dense
                for s in plan.sites.values())  # fmt: skip
    spare = min(ratio * plan.bits_total, whole) - plan.bits_kept
    assert spare < max(quantization.cost(Shape(16, 24)).component, 16 * 24)


def test_remap_counts_as_its_papers_say() -> None:
    """max(m, n) entries a component; the first min(m, n) channels of both factors in int8."""
    result = run(Remap(), 0.6)
    layers = low_rank_layers(result.model)
    assert layers
    for name, layer in layers.items():
        m, n, k = layer.out_features, layer.in_features, layer.rank
        site = result.plan.sites[name]
        scales = 2 * min(m, n)
        assert site.bits == 16 * (k * max(m, n) + scales)
        assert site.rounded_rows == 2 * min(m, n) and site.rows == m + n
        assert layer.rows("left").order is None and layer.rows("weight").order is None
        assert layer.rows("left").codes.shape == (min(m, n), k)
        assert layer.rows("weight").codes.shape == (k, min(m, n))


def test_half_at_a_ratio_that_fits_everything_is_the_int8_model() -> None:
    result = run(Half(), 0.8)
    assert not result.plan.ranks
    dense = build("llama")
    for name, layer in compressed_layers(result.model).items():
        weight = dense.get_submodule(name).weight.detach()
        step = weight.abs().amax(1) / 127
        error = (layer.product() - weight).abs().amax(1)
        assert (error <= step / 2 * (1 + 2**-9)).all() and error.max() > 0
    # Weights of int8 and one scale a row.
    assert result.plan.bits_kept == sum(
        8 * s.out_features * s.in_features + 16 * s.out_features for s in result.plan.sites.values()
    )


@pytest.mark.parametrize("ratio", [0.4, 0.45, 0.5, 0.62, 0.8])
def test_round_to_nearest_spends_the_same_bytes(ratio: float) -> None:
    result = run(RoundToNearest(group=8), ratio)
    assert not result.plan.ranks
    free = ratio * result.plan.bits_total - result.plan.bits_kept
    assert 0 <= free < 4 * 16 * 24  # One site between four bits and eight.
    kinds = {type(layer).__name__ for layer in compressed_layers(result.model).values()}
    assert kinds == ({"RowLinear"} if ratio >= 0.62 else {"FourBitLinear", "RowLinear"})


def test_random_rows_depend_on_the_seed_alone() -> None:
    def chosen(seed: int) -> list[Tensor]:
        stored = run(LossAwareRemap(Score.random, seed=seed), 0.7).model.state_dict()
        return [value for name, value in stored.items() if name.endswith("order")]

    first, second, other = chosen(1), chosen(1), chosen(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(first) != len(other) or not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True)
    )


def test_a_searched_rank_budget_predicts_no_worse_than_the_others() -> None:
    best = run(LossAwareRemap(rank_budget=RankBudget.search), 0.4).plan.predicted_kl
    double = run(LossAwareRemap(Score.second_order), 0.4).plan.predicted_kl
    fixed = LossAwareRemap(Score.second_order, rank_budget=RankBudget.fixed, rank_ratio=0.4)
    least = run(fixed, 0.4).plan.predicted_kl
    assert best is not None and double is not None and least is not None
    assert best <= min(double, least) * 1.05


def test_rank_budgets_span_from_the_ratio_to_all_that_fits() -> None:
    scheme = LossAwareRemap(rank_budget=RankBudget.search)
    budget = Budget(SHAPES, 0.4, scheme.cost)
    ratios = [b.ratio for b in scheme.rank_budgets(budget)]
    whole = sum(scheme.cost(s).dense for s in SHAPES.values()) / budget.total
    assert ratios[0] == pytest.approx(0.4 * whole) and ratios[-1] == pytest.approx(0.4)
    assert len(ratios) == 6 and ratios == sorted(ratios)


def test_a_rank_ratio_that_does_not_fit_in_int8_is_one_line() -> None:
    scheme = LossAwareRemap(rank_budget=RankBudget.fixed, rank_ratio=0.9)
    with pytest.raises(BudgetError, match=r"rank_ratio=0\.9 takes 0\.\d+ .* lower rank_ratio to"
                       ) as error:  # fmt: skip
        run(scheme, 0.4)
    advised = float(str(error.value).split("lower rank_ratio to ")[1].split()[0])
    assert run(dataclasses.replace(scheme, rank_ratio=advised), 0.4).plan.ratio_achieved > 0.38


def test_a_rank_ratio_below_rank_one_is_one_line() -> None:
    scheme = LossAwareRemap(rank_budget=RankBudget.fixed, rank_ratio=0.05)
    with pytest.raises(BudgetError, match=r"rank_ratio=0\.05 is below what rank 1"):
        run(scheme, 0.4)


def test_a_search_leaves_out_what_is_too_small() -> None:
    searched = run(LossAwareRemap(rank_budget=RankBudget.search), 0.12)
    assert searched.plan.ratio_achieved <= 0.12


def test_whole_int8_sites_fit_to_the_bit() -> None:
    """At the shapes of Qwen2.5-7B, where a share of the bits and back would lose one."""
    shapes = {}
    for layer in range(28):
        for role, m, n in (
            *(("q", 3584, 3584), ("k", 512, 3584), ("v", 512, 3584), ("o", 3584, 3584)),
            *(("gate", 18944, 3584), ("up", 18944, 3584), ("down", 3584, 18944)),
        ):
            shapes[f"{layer}.{role}"] = Shape(m, n)
    for rank_budget in (RankBudget.double, RankBudget.search):
        scheme = LossAwareRemap(rank_budget=rank_budget)
        budget = Budget(shapes, 0.8, scheme.cost)
        dense = sum(cost.dense for cost in budget.costs.values())
        assert scheme.rank_budgets(budget)[-1].limit >= dense


@pytest.mark.parametrize(
    "options",
    [
        {"rank_ratio": 0.5},
        {"rank_budget": RankBudget.fixed},
        {"rank_budget": RankBudget.fixed, "rank_ratio": 1.5},
        {"windows": -1},
    ],
    ids=str,
)
def test_options_that_contradict_each_other(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        LossAwareRemap(**options)  # type: ignore[arg-type]


def test_a_ratio_that_even_four_bits_exceed_is_one_line() -> None:
    with pytest.raises(BudgetError, match=r"ratio 0\.2 is below 0\.\d+, what storing every one"):
        run(RoundToNearest(), 0.2)


def test_a_weight_beyond_fp16_names_its_site() -> None:
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 2] = 1e7
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj.*fp16"):
        compress(
            model, TOKENS, ratio=0.9, method=Method(Identity(), Uniform(), quantization=Half()),
        )  # fmt: skip


def test_a_row_of_zeros_is_no_error() -> None:
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3] = 0
    result = compress(
        model, TOKENS, ratio=0.9, method=Method(Identity(), Uniform(), quantization=Half())
    )
    layer = compressed_layers(result.model)["model.layers.1.mlp.up_proj"]
    assert (layer.product()[3] == 0).all() and layer.product()[2].abs().sum() > 0


def test_what_stays_in_sixteen_bits_and_does_not_fit_names_its_site() -> None:
    model = build("llama")
    find_sites(model, SiteSelection())["model.layers.0.mlp.up_proj"].weight.data[1, 1] = 7e4
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.up_proj.*fp16"):
        remap = LossAwareRemap(Score.second_order)
        method = Method(Identity(), Uniform(), quantization=remap)
        compress(model, TOKENS, ratio=1.0, method=method)
