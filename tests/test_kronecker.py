"""GFWSVD's factors against the nearest Kronecker product by a full SVD of the rearranged Fisher."""

from __future__ import annotations

import pytest
import torch
from conftest import build
from test_fisher import tokens, window_gradients
from torch import Tensor
from torch.testing import assert_close

from iosvd.models.sites import SiteSelection, find_sites
from iosvd.statistics.collect import collect
from iosvd.statistics.kronecker import KroneckerSums
from iosvd.statistics.needs import Needs
from iosvd.whitening import Gfwsvd


def nearest_product(gradients: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """B (m, m), A (n, n) with B ⊗ A nearest to E[vec(G) vec(G)ᵀ], and σ_2 / σ_1 of the search."""
    m, n = gradients[0].shape
    stacked = torch.stack(gradients).flatten(1)  # vec by rows: W[i, j] at i n + j
    fisher = stacked.T @ stacked / len(stacked)
    blocks = fisher.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)
    u, sigma, vh = torch.linalg.svd(blocks, full_matrices=False)
    sign = torch.sign(u[:, 0].reshape(m, m).trace())
    b, a = sign * u[:, 0].reshape(m, m), sign * sigma[0] * vh[0].reshape(n, n)
    return b, a, float(sigma[1] / sigma[0])


def random_gradients(m: int, n: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(m, m, generator=generator, dtype=torch.float64)
    right = torch.randn(n, n, generator=generator, dtype=torch.float64)
    g = torch.randn(count, m, n, generator=generator, dtype=torch.float64)
    return list(left @ g @ right)


@pytest.mark.parametrize(("m", "n"), [(4, 6), (6, 4), (5, 5)])
def test_power_iterations_find_the_nearest_kronecker_product(m: int, n: int) -> None:
    gradients = random_gradients(m, n, 12)
    sums, passes = KroneckerSums(), 60
    for number in range(passes):
        for g in gradients:
            sums.add("site", g)
        sums.finish_pass(len(gradients), number == passes - 1)
    b, a, _ = nearest_product(gradients)
    assert_close(sums.left["site"], b, rtol=1e-6, atol=1e-8)
    assert_close(sums.right["site"], a, rtol=1e-6, atol=1e-8)


def test_it_is_not_the_pair_of_marginal_covariances() -> None:
    gradients = random_gradients(4, 6, 12)
    b, _, _ = nearest_product(gradients)
    marginal = sum(g @ g.T for g in gradients)
    assert isinstance(marginal, Tensor)
    assert (marginal / marginal.norm() - b).norm() > 0.05


def test_factors_of_a_model_converge_to_the_nearest_product() -> None:
    """Each pass over the calibration set brings the factors nearer, at the rate of σ_2 / σ_1."""
    model = build("llama", torch.float64)
    name = "model.layers.1.self_attn.v_proj"
    sites = {name: find_sites(model, SiteSelection())[name]}
    b, a, rate = nearest_product(window_gradients("llama", tokens(8))[name])

    def error(passes: int) -> float:
        needs = Needs(kronecker_passes=passes)
        found = collect(model, tokens(8), sites, needs, batch_size=3)[name]
        pairs = ((found.kronecker_left, b), (found.kronecker_right, a))
        return max(float((x / x.norm() - y / y.norm()).norm()) for x, y in pairs)  # type: ignore[union-attr]

    assert rate < 1
    assert error(2) > error(6) > error(20)
    assert error(60) < 1e-4


def test_one_pass_gives_only_one_factor_and_is_refused() -> None:
    with pytest.raises(Exception, match="passes=1 is below 2"):
        Gfwsvd(passes=1)
