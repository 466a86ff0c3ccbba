"""SAES-SVD's coefficient against its definition, tried on a grid (METHODS 11.4)."""

from __future__ import annotations

import pytest
import torch
from pytest import approx
from test_correction import drift_of, run, tokens_of_a_site
from torch import Tensor

from iosvd.correction import Anchored, Sequential
from iosvd.correction.adaptive_trust import AdaptiveTrust, least_share
from iosvd.errors import ConfigError
from iosvd.layers.replacement import low_rank_layers


def shares(x_d: Tensor, x_c: Tensor, weight: Tensor, rank: int, betas: Tensor) -> Tensor:
    """The share that is lost to first order, for each β, from the tokens and a plain SVD."""
    count = len(x_c)
    h, shift = x_c.T @ x_c / count, (x_d - x_c).T @ x_c / count
    values, vectors = torch.linalg.eigh(h)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    s, d = weight @ h @ root, weight @ shift @ root
    u, _, vh = torch.linalg.svd(s)
    rest_u, rest_v = u[:, rank:], vh[rank:].T
    found = []
    for beta in betas:
        g = s + beta * d
        lost = rest_u.T @ g @ rest_v
        found.append(lost.square().sum() / g.square().sum())
    return torch.stack(found)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("largest", [1.0, 0.3])
def test_the_coefficient_loses_the_least_share(rank: int, largest: float) -> None:
    weight, x_d, x_c, _ = tokens_of_a_site()
    found = AdaptiveTrust(largest=largest).of(weight, drift_of(x_d, x_c, None), 0.0, rank)
    grid = shares(x_d, x_c, weight, rank, torch.linspace(0, largest, 2001))
    at = shares(x_d, x_c, weight, rank, torch.tensor([found]))
    assert 0 <= found <= largest
    assert float(at) <= float(grid.min()) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_least_share_is_that_of_a_grid(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lost_s, lost_d, kept_s, kept_d = torch.randn(4, 3, generator=draw, dtype=torch.float64)
    lost = tuple(float(x) for x in (lost_s @ lost_s, lost_s @ lost_d, lost_d @ lost_d))
    kept = tuple(float(x) for x in (kept_s @ kept_s, kept_s @ kept_d, kept_d @ kept_d))
    whole = tuple(a + b for a, b in zip(lost, kept, strict=True))

    def share(beta: float) -> float:
        of = [q[0] + 2 * q[1] * beta + q[2] * beta**2 for q in (lost, whole)]
        return of[0] / of[1]

    found = least_share(lost, whole, 1.0)  # type: ignore[arg-type]
    assert share(found) <= min(share(i / 5000) for i in range(5001)) + 1e-12


def test_polynomials_without_a_square_or_without_a_root() -> None:
    assert least_share((1.0, 0.0, 0.0), (2.0, 0.0, 0.0), 1.0) == 0.0  # Constant.
    assert least_share((1.0, -1.0, 1.0), (2.0, 0.0, 0.0), 1.0) == approx(1.0)  # (1 − β)² / 2.
    assert least_share((1.0, -0.5, 1.0), (4.0, 0.0, 0.0), 1.0) == approx(0.5)
    assert least_share((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 1.0) == 0.0


def test_a_share_of_the_coefficient_may_be_taken() -> None:
    weight, x_d, x_c, _ = tokens_of_a_site()
    drift = drift_of(x_d, x_c, None)
    whole = AdaptiveTrust().of(weight, drift, 1e-6, 3)
    assert AdaptiveTrust(shrink=0.4).of(weight, drift, 1e-6, 3) == approx(0.4 * whole)


def test_a_largest_coefficient_of_zero_is_the_target_behind_the_prefix() -> None:
    adaptive = low_rank_layers(run(Sequential(adaptive=AdaptiveTrust(largest=0.0)), 0.5).model)
    fixed = low_rank_layers(run(Sequential(alpha=0.0), 0.5).model)
    free = low_rank_layers(run(Sequential(adaptive=AdaptiveTrust()), 0.5).model)
    for name, layer in fixed.items():
        assert torch.equal(adaptive[name].left, layer.left), name
    assert any(not torch.equal(free[name].left, layer.left) for name, layer in fixed.items())


def test_contradicting_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"anchored and correction\.adaptive both choose"):
        Sequential(anchored=True, adaptive=AdaptiveTrust())
    with pytest.raises(ConfigError, match=r"set correction\.stream=false"):
        Anchored(adaptive=AdaptiveTrust())
    with pytest.raises(ConfigError, match=r"adaptive\.largest=1\.5 is outside \[0, 1\]"):
        AdaptiveTrust(largest=1.5)
