"""Schemes use their budgets to within a row, choose the rows they say, predict what they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from conftest import FAMILIES, all_variants, build, random_statistics
from torch import Tensor

import iosvd.quantization
from iosvd.allocation import Spectral, Uniform
from iosvd.budget import Budget, Shape
from iosvd.errors import BudgetError, ConfigError, NumericalError
from iosvd.factorization import Factorization, truncate
from iosvd.int8 import Code
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
from iosvd.quantization.base import Site
from iosvd.quantization.scores import row_scores, second_order
from iosvd.quantization.selection import ScoredRows, choose_int8
from iosvd.quantization.stored import store_site
from iosvd.replacement import compressed_layers, low_rank_layers, stored_bytes
from iosvd.rows import restore
from iosvd.sites import SiteSelection, find_sites
from iosvd.statistics import collect
from iosvd.types import Needs
from iosvd.whitening import Identity, InputOutput

TOKENS = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(1))
SHAPES = {"q": Shape(16, 16), "k": Shape(8, 16), "up": Shape(40, 16), "down": Shape(16, 40)}


def run(
    quantization: Quantization,
    ratio: float = 0.6,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
) -> Compressed:
    return compress(
        build(family, dtype),
        TOKENS,
        ratio=ratio,
        whitening=InputOutput(),
        allocation=Spectral(),
        quantization=quantization,
    )


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
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.7, 0.8, 0.9])
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


def literal_choice(matrices: Mapping[str, ScoredRows], limit: int) -> dict[str, list[bool]]:
    """IO-SVD+'s rule as worded: int8 for the lowest scores, one by one, until the bytes fit."""
    int8 = {key: [False] * len(m.scores) for key, m in matrices.items()}
    lowest = sorted(
        (float(score), key, row)
        for key, m in matrices.items()
        for row, score in enumerate(m.scores)
    )

    def bits() -> int:
        total = 0
        for key, m in matrices.items():
            chosen, count = sum(int8[key]), len(m.scores)
            total += chosen * (8 * m.columns + 16) + (count - chosen) * 16 * m.columns
            total += 16 * count if 0 < chosen < count else 0
        return total

    for _, key, row in lowest:
        if bits() <= limit:
            break
        int8[key][row] = True
    return int8


@pytest.mark.parametrize("share", [0.52, 0.6, 0.7, 0.85, 0.97])
@pytest.mark.parametrize("seed", range(4))
def test_the_lowest_scores_become_int8(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = {k: ScoredRows(400, torch.rand(30, generator=generator)) for k in "abc"}
    whole = sum(16 * 400 * 30 for _ in matrices)
    limit = int(share * whole)
    found = choose_int8(matrices, limit)
    expected = literal_choice(matrices, limit)
    # Rows of one size: the same rows, but that orders may make room for one or two more.
    differing = sum(int((found[k] != torch.tensor(expected[k])).sum()) for k in "abc")
    assert differing <= 2
    used = sum(m.bits(int(found[k].sum())) for k, m in matrices.items())
    assert limit - (8 * 400 - 16) < used <= limit or all(not f.any() for f in found.values())


def test_rows_whose_scale_is_larger_than_the_saving_stay() -> None:
    found = choose_int8({"thin": ScoredRows(2, torch.zeros(9))}, 10**6)
    assert not found["thin"].any()


def site_with_gradient() -> tuple[Site, Tensor, Tensor]:
    """A truncated site in float64, with its full metrics."""
    weight, statistics = random_statistics(12, 9)
    spectrum = Factorization()(weight, InputOutput()(statistics), "x")
    gradient = torch.randn(12, 9, generator=torch.Generator().manual_seed(3)).double()
    site = Site(
        "x",
        weight,
        truncate(spectrum, 5),
        spectrum.output_diagonal,
        spectrum.input_diagonal,
        gradient,
    )
    assert statistics.kl_metric is not None and statistics.input_metric is not None
    return site, statistics.kl_metric, statistics.input_metric


@pytest.mark.parametrize("axis", Axis)
def test_first_order_score_is_the_derivative(axis: Axis) -> None:
    """Of a loss ⟨G, left right⟩, which is linear in the product, with one row moved a little."""
    site, _, _ = site_with_gradient()
    assert site.factors is not None and site.gradient is not None
    for name, matrix in site.matrices().items():
        out = axis.by_output(name, dense=False)
        error = torch.randn(matrix.values.shape, dtype=torch.float64)
        scores = row_scores(matrix, error, out, Score.signed)
        assert torch.equal(row_scores(matrix, error, out, Score.absolute), scores.abs())
        for row, score in enumerate(scores):
            only = torch.zeros_like(error)
            index = (row, slice(None)) if out else (slice(None), row)
            only[index] = error[index]
            left = site.factors.left + (only if name == "left" else 0)
            right = site.factors.right + (only if name == "weight" else 0)
            change = (site.gradient * (left @ right - site.factors.dense())).sum()
            assert float(score) == pytest.approx(float(change), rel=1e-9, abs=1e-12)


def test_second_order_score_is_the_expected_cost_in_the_two_metrics() -> None:
    """½ tr(ΔWᵀ C ΔW R) by Monte Carlo over the signs of the errors, row by row."""
    site, c, r = site_with_gradient()
    assert site.factors is not None
    generator = torch.Generator().manual_seed(0)
    for name, matrix in site.matrices().items():
        error = torch.rand(matrix.values.shape, generator=generator).double()
        predicted = second_order(matrix, error, by_output=True)
        for row in (0, 3):
            signs = torch.randint(0, 2, (4000, error.shape[1]), generator=generator) * 2.0 - 1
            moved = torch.zeros(4000, *error.shape, dtype=torch.float64)
            moved[:, row] = error[row] * signs
            change = moved @ site.factors.right if name == "left" else site.factors.left @ moved
            costs = (change.transpose(1, 2) @ c @ change @ r).diagonal(dim1=1, dim2=2).sum(1) / 2
            assert float(costs.mean()) == pytest.approx(float(predicted[row]), rel=0.08)


def test_energies_of_the_factors_are_their_lengths_in_the_metrics() -> None:
    for algorithm_shape in ((12, 9), (9, 12)):
        weight, statistics = random_statistics(*algorithm_shape)
        whitener = InputOutput()(statistics)
        spectrum = Factorization()(weight, whitener, "x")
        factors = truncate(spectrum, 4)
        eye_m, eye_n = (torch.eye(d, dtype=torch.float64) for d in algorithm_shape)
        root_c, root_r = whitener.left.apply(eye_m), whitener.right.apply(eye_n)
        left = (root_c @ factors.left).square().sum(0)
        right = (root_r @ factors.right.T).square().sum(0)
        torch.testing.assert_close(factors.left_energy, left)
        torch.testing.assert_close(factors.right_energy, right)
        torch.testing.assert_close(left * right, spectrum.sigma[:4] ** 2)
        torch.testing.assert_close(spectrum.output_diagonal, (root_c.T @ root_c).diagonal())
        torch.testing.assert_close(spectrum.input_diagonal, (root_r.T @ root_r).diagonal())


def test_the_gradient_is_that_of_the_truncated_model() -> None:
    """Against autograd on the factors themselves."""
    model = run(NoQuantization(), 0.6).model
    layers = low_rank_layers(model)
    found = collect(model, TOKENS, layers, Needs(gradient_windows=8))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, layer in layers.items():
        gradient = found[name].gradient
        assert gradient is not None and layer.left.grad is not None
        torch.testing.assert_close(gradient @ layer.weight.T, layer.left.grad)
        torch.testing.assert_close(layer.left.T @ gradient, layer.weight.grad)


def test_rounding_loss_is_the_cost_of_what_was_stored_in_diagonal_metrics() -> None:
    """½ tr(ΔᵀCΔR) entry by entry, where C and R are diagonal and nothing is left out."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(12, 9, generator=generator).double()
    c, r = (torch.rand(d, generator=generator).double() for d in (12, 9))
    stored = store_site(
        Site("x", weight, None, c, r),
        {"weight": torch.arange(12) % 2 == 0},
        {"weight": True},
        torch.float16,
    )
    change = restore(stored.rows["weight"], stored.layouts["weight"], torch.float64) - weight
    expected = 0.5 * torch.trace(change.T @ torch.diag(c) @ change @ torch.diag(r))
    assert stored.rounding_loss == pytest.approx(float(expected), rel=1e-4)
    assert stored.rounded == (6, 12)


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


def test_what_fits_into_sixteen_bits_is_put_back() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = {k: ScoredRows(64, torch.rand(64, generator=generator)) for k in "abcd"}
    found = choose_int8(matrices, sum(m.bits(0) for m in matrices.values()))
    assert not any(int8.any() for int8 in found.values())


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
            model, TOKENS, ratio=0.9, whitening=Identity(), allocation=Uniform(),
            quantization=Half(),
        )  # fmt: skip


def test_a_row_of_zeros_is_no_error() -> None:
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3] = 0
    result = compress(
        model, TOKENS, ratio=0.9, whitening=Identity(), allocation=Uniform(), quantization=Half()
    )
    layer = compressed_layers(result.model)["model.layers.1.mlp.up_proj"]
    assert (layer.product()[3] == 0).all() and layer.product()[2].abs().sum() > 0


def test_what_stays_in_sixteen_bits_and_does_not_fit_names_its_site() -> None:
    model = build("llama")
    find_sites(model, SiteSelection())["model.layers.0.mlp.up_proj"].weight.data[1, 1] = 7e4
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.up_proj.*fp16"):
        compress(
            model, TOKENS, ratio=1.0, whitening=Identity(), allocation=Uniform(),
            quantization=LossAwareRemap(Score.second_order),
        )  # fmt: skip
