"""What a row costs the loss, by derivative and by the metrics, and which rows are chosen."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from conftest import build, random_statistics
from torch import Tensor

from iosvd.allocation import Spectral
from iosvd.factorization import Factorization, truncate
from iosvd.layers.replacement import low_rank_layers
from iosvd.layers.rows import restore
from iosvd.method import Method
from iosvd.pipeline import compress
from iosvd.quantization import Axis, Score
from iosvd.quantization.scores import row_scores, second_order
from iosvd.quantization.selection import ScoredRows, choose_int8
from iosvd.quantization.stored import store_site
from iosvd.statistics.collect import collect
from iosvd.statistics.needs import Needs
from iosvd.types import Site
from iosvd.whitening import InputOutput

TOKENS = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(1))


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
    model = compress(
        build("llama"), TOKENS, ratio=0.6, method=Method(InputOutput(), Spectral())
    ).model
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


def test_what_fits_into_sixteen_bits_is_put_back() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = {k: ScoredRows(64, torch.rand(64, generator=generator)) for k in "abcd"}
    found = choose_int8(matrices, sum(m.bits(0) for m in matrices.values()))
    assert not any(int8.any() for int8 in found.values())
