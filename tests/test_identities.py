"""The identities of METHODS 1 that hold for one site, for every whitening; the fifth is in
test_prediction.py, because it is about a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import all_variants, random_statistics
from torch import Tensor
from torch.testing import assert_close

import iosvd.whitening
from iosvd.factorization import Algorithm, Factorization, truncate
from iosvd.linalg import Root, RootKind
from iosvd.scoring import with_loss_change
from iosvd.statistics.needs import STATISTICS, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening import Whitening

SHAPES = [(12, 20), (20, 12), (16, 16)]
whitenings = pytest.mark.parametrize("whitening", all_variants(iosvd.whitening))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
algorithms = pytest.mark.parametrize("algorithm", list(Algorithm))


@dataclass(frozen=True)
class Rotated:
    """Another root of the same metric: L Q with Q orthogonal."""

    root: Root
    rotation: Tensor
    damping: float = 0.0

    def apply(self, matrix: Tensor) -> Tensor:
        return self.rotation.T @ self.root.apply(matrix)

    def unapply(self, matrix: Tensor) -> Tensor:
        return self.root.unapply(self.rotation @ matrix)

    def diagonal(self, like: Tensor) -> Tensor:
        return self.root.diagonal(like)


def metrics(whitener: Whitener, m: int, n: int) -> Iterator[Tensor]:
    """The damped C and R that a whitener stands for."""
    for root, size in ((whitener.left, m), (whitener.right, n)):
        factor = root.apply(torch.eye(size, dtype=torch.float64)).T
        yield factor @ factor.T


def ranks(m: int, n: int) -> tuple[int, ...]:
    return 1, 5, min(m, n) - 1, min(m, n)


@whitenings
@shapes
@algorithms
def test_dropped_energy_is_the_weighted_error(
    whitening: type[Whitening], shape: tuple[int, int], algorithm: Algorithm
) -> None:
    weight, statistics = random_statistics(*shape)
    whitener = whitening()(statistics)
    metric_out, metric_in = metrics(whitener, *shape)
    spectrum = Factorization(algorithm)(weight, whitener, "site")
    for k in ranks(*shape):
        delta = weight - truncate(spectrum, k).dense()
        weighted = torch.trace(delta.T @ metric_out @ delta @ metric_in)
        energy = (spectrum.sigma[k:] ** 2).sum()
        assert_close(weighted, energy, rtol=1e-9, atol=1e-12 * float(spectrum.sigma[0] ** 2))


@whitenings
@shapes
@algorithms
def test_truncation_does_not_depend_on_the_roots(
    whitening: type[Whitening], shape: tuple[int, int], algorithm: Algorithm
) -> None:
    weight, statistics = random_statistics(*shape)
    whitener = whitening()(statistics)
    turns = [torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for size in shape]
    turned = Whitener(Rotated(whitener.left, turns[0]), Rotated(whitener.right, turns[1]))
    for k in ranks(*shape):
        one, other = (
            truncate(Factorization(algorithm)(weight, value, "site"), k).dense()
            for value in (whitener, turned)
        )
        assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "whitening", [w for w in all_variants(iosvd.whitening) if hasattr(w, "root")]
)
def test_root_option_does_not_change_the_result(whitening: type[Whitening]) -> None:
    weight, statistics = random_statistics(12, 20)
    one, other = (
        truncate(Factorization()(weight, whitening(root=kind)(statistics), "site"), 5).dense()  # type: ignore[call-arg]
        for kind in RootKind
    )
    assert_close(one, other, rtol=1e-7, atol=1e-8)


@whitenings
@shapes
@algorithms
def test_full_rank_gives_the_weight_back(
    whitening: type[Whitening], shape: tuple[int, int], algorithm: Algorithm
) -> None:
    weight, statistics = random_statistics(*shape)
    spectrum = Factorization(algorithm)(weight, whitening()(statistics), "site")
    assert_close(truncate(spectrum, min(shape)).dense(), weight, rtol=1e-8, atol=1e-9)


@whitenings
@shapes
@algorithms
def test_loss_change_is_the_derivative_along_a_component(
    whitening: type[Whitening], shape: tuple[int, int], algorithm: Algorithm
) -> None:
    weight, statistics = random_statistics(*shape)
    spectrum = Factorization(algorithm)(weight, whitening()(statistics), "site")

    def loss(w: Tensor) -> Tensor:
        return (w @ torch.linspace(-1, 1, shape[1], dtype=torch.float64)).tanh().pow(2).sum()

    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    scored = with_loss_change(spectrum, gradient)
    # d loss / d t_i of W = Σ t_i left_i right_i, at t = 1, is −(change when t_i goes to zero).
    t = torch.ones(min(shape), dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(loss((spectrum.left * t) @ spectrum.right), t)
    assert scored.loss_change is not None
    assert_close(scored.loss_change, -derivative, rtol=1e-6, atol=1e-9)


@whitenings
def test_loss_change_ignores_the_scale_of_the_metrics(whitening: type[Whitening]) -> None:
    weight, statistics = random_statistics(12, 20)
    assert statistics.gradient is not None

    def changes(statistics: SiteStatistics) -> Tensor:
        spectrum = Factorization()(weight, whitening()(statistics), "site")
        changes = with_loss_change(spectrum, statistics.gradient).loss_change  # type: ignore[arg-type]
        assert changes is not None
        return changes

    metrics = {name: getattr(statistics, name) for name in STATISTICS if name != "gradient"}
    scaled = replace(
        statistics,
        **{name: (1e3 if "input" in name else 1e-5) * value for name, value in metrics.items()},
    )
    assert_close(changes(scaled), changes(statistics), rtol=1e-6, atol=1e-9)


@shapes
def test_no_other_rank_k_matrix_is_nearer_in_the_metrics(shape: tuple[int, int]) -> None:
    """An independent optimiser, started at the result, finds nothing better."""
    weight, statistics = random_statistics(*shape)
    whitener = iosvd.whitening.InputOutput()(statistics)
    metric_out, metric_in = metrics(whitener, *shape)
    factors = truncate(Factorization()(weight, whitener, "site"), 4)

    def error(left: Tensor, right: Tensor) -> Tensor:
        delta = weight - left @ right
        return torch.trace(delta.T @ metric_out @ delta @ metric_in)

    best = error(factors.left, factors.right)
    left = (factors.left * (1 + 0.1 * torch.randn_like(factors.left))).contiguous().requires_grad_()
    right = (
        (factors.right * (1 + 0.1 * torch.randn_like(factors.right))).contiguous().requires_grad_()
    )
    optimizer = torch.optim.LBFGS(
        [left, right], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = error(left, right) / best
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    found = float(error(left, right).detach())
    assert float(best) * (1 - 1e-9) <= found
    assert found == pytest.approx(float(best), rel=0.05)  # The search was a real one.


def test_factors_are_balanced_so_that_half_precision_holds_them() -> None:
    weight, statistics = random_statistics(12, 20)
    tiny = replace(statistics, kl_metric=1e-14 * statistics.kl_metric)  # type: ignore[operator]
    factors = truncate(Factorization()(weight, iosvd.whitening.InputOutput()(tiny), "site"), 5)
    assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))
    half = factors.left.half().double() @ factors.right.half().double()
    assert_close(half, factors.dense(), rtol=2e-2, atol=2e-2)


def test_a_weight_of_zeros_is_factorised() -> None:
    _, statistics = random_statistics(12, 20)
    zeros = torch.zeros(12, 20, dtype=torch.float64)
    spectrum = Factorization()(zeros, iosvd.whitening.Input()(statistics), "site")
    assert truncate(spectrum, 3).dense().abs().max() == 0


@whitenings
@shapes
@algorithms
@pytest.mark.parametrize("dead", ["all", "inputs", "outputs", "rank"])
def test_a_weight_with_less_than_full_rank_is_given_back_too(
    dead: str, whitening: type[Whitening], shape: tuple[int, int], algorithm: Algorithm
) -> None:
    """Weights of zeros, dead channels, a rank below the one that is asked for: never NaN."""
    weight, statistics = random_statistics(*shape)
    if dead == "inputs":
        weight[:, 3:] = 0
    elif dead == "outputs":
        weight[2:] = 0
    else:
        weight = weight[:, :1] @ weight[:1] if dead == "rank" else 0 * weight
    spectrum = Factorization(algorithm)(weight, whitening()(statistics), "site")
    for k in ranks(*shape):
        factors = truncate(spectrum, k)
        for value in (*vars(factors).values(), factors.dense()):
            assert torch.isfinite(value).all()
    scale = max(float(weight.abs().max()), 1.0)
    assert_close(truncate(spectrum, min(shape)).dense(), weight, rtol=1e-6, atol=1e-6 * scale)
