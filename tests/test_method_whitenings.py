"""The published whitenings against their defining equations, worked independently."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import random_statistics
from torch import Tensor
from torch.testing import assert_close

from iosvd.errors import ConfigError, NumericalError
from iosvd.factorization import Factorization, truncate
from iosvd.statistics.needs import SiteStatistics
from iosvd.whitening import ChannelWeighted, Fisher, Fwsvd, Gfwsvd, Input, InputOutput
from iosvd.whitening.channel_weighted import Weighting

DOUBLE = torch.float64


def test_fwsvd_is_the_optimum_of_its_weighted_error_by_brute_force() -> None:
    """Rank one, three rows: every direction of the right vector on a fine grid of the sphere."""
    weight = torch.tensor([[3.0, 1.0, 0.5], [0.2, 2.0, -1.0], [1.0, -1.0, 4.0]], dtype=DOUBLE)
    fisher = torch.tensor([5.0, 40.0, 1.0], dtype=DOUBLE)
    whitener = Fwsvd(damping=0.0)(SiteStatistics("s", fisher_rows=fisher))
    found = truncate(Factorization()(weight, whitener, "s"), 1).dense()

    def error(approximation: Tensor) -> float:
        return float((fisher[:, None] * (weight - approximation) ** 2).sum())

    angles = torch.linspace(0, torch.pi, 181, dtype=DOUBLE).tolist()
    best = torch.inf
    for a, b in itertools.product(angles, angles):
        a_, b_ = torch.tensor(a), torch.tensor(b)
        v = torch.stack([a_.cos(), a_.sin() * b_.cos(), a_.sin() * b_.sin()]).to(DOUBLE)
        # For a given direction each row's best coefficient is its own projection.
        best = min(best, error(torch.outer(weight @ v, v)))
    assert error(found) <= best + 1e-12
    assert best == pytest.approx(error(found), rel=1e-3)  # The grid reaches it.


def test_fwsvd_names_a_site_without_gradient() -> None:
    with pytest.raises(NumericalError, match=r"gradients of s are all zero"):
        Fwsvd()(SiteStatistics("s", fisher_rows=torch.zeros(3)))


def strong_channels(x: Tensor, share: float) -> list[int]:
    """DipSVD's importance as the paper words it: √(x_jᵀ X Xᵀ x_j) of channel j, from the inputs."""
    importance = [float((x[:, j] @ (x @ x.T) @ x[:, j]).sqrt()) for j in range(x.shape[1])]
    ordered = sorted(range(len(importance)), key=lambda j: -importance[j])
    return ordered[: int(share * len(importance))]


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(40, generator=generator, dtype=DOUBLE) * 3
    return torch.randn(300, 40, generator=generator, dtype=DOUBLE) * scale


@pytest.mark.parametrize("share", [0.05, 0.25])
def test_channel_weights_are_those_of_the_most_important_channels(share: float) -> None:
    x = inputs()
    weights = ChannelWeighted(share=share).weights(x.T @ x / len(x))
    strong = strong_channels(x, share)
    assert len(strong) == int(share * 40) > 0
    expected = [30.0 if j in strong else 1.0 for j in range(40)]
    assert weights.tolist() == expected


def test_channel_weighted_roots_are_the_two_readings() -> None:
    x = inputs()
    metric = x.T @ x / len(x)
    d = torch.diag(ChannelWeighted().weights(metric))
    identity = torch.eye(40, dtype=DOUBLE)

    def metric_of(weighting: Weighting) -> Tensor:
        whitening = ChannelWeighted(weighting=weighting, damping=0.0)
        root = whitening(SiteStatistics("s", input_metric=metric)).right
        return root.apply(identity).T @ root.apply(identity)

    u, values, _ = torch.linalg.svd(metric @ d)
    assert_close(metric_of(Weighting.columns), u @ torch.diag(values) @ u.T)
    # Weighting the inputs themselves and whitening by what they then are.
    weighted = x @ d
    assert_close(metric_of(Weighting.inputs), weighted.T @ weighted / len(x))


def test_channel_weighted_with_factor_one_is_svd_llm() -> None:
    weight, statistics = random_statistics(12, 20)
    for weighting in Weighting:
        one = ChannelWeighted(factor=1.0, weighting=weighting)(statistics)
        ranks = (
            truncate(Factorization()(weight, w, "s"), 5).dense() for w in (one, Input()(statistics))
        )
        assert_close(*ranks, rtol=1e-6, atol=1e-8)


def test_channel_weighted_survives_a_singular_metric() -> None:
    x = inputs()[:10]  # Fewer tokens than channels.
    statistics = SiteStatistics("s", input_metric=x.T @ x / 10)
    weight = torch.randn(30, 40, dtype=DOUBLE)
    spectrum = Factorization()(weight, ChannelWeighted()(statistics), "s")
    assert torch.isfinite(truncate(spectrum, 5).dense()).all()
    assert spectrum.damping_input >= 1e-6


def test_channel_weighted_refuses_impossible_weights() -> None:
    with pytest.raises(ConfigError, match=r"share=1\.5 is above 1"):
        ChannelWeighted(share=1.5)
    with pytest.raises(ConfigError, match=r"factor=0\.5 is below 1"):
        ChannelWeighted(factor=0.5)


@pytest.mark.parametrize(
    ("whitening", "left", "right"),
    [(Fisher(), "fisher_metric", "input_metric"), (Gfwsvd(), "kronecker_left", "kronecker_right")],
)
def test_double_sided_methods_minimise_the_error_in_their_metrics(
    whitening: Fisher | Gfwsvd, left: str, right: str
) -> None:
    """Against symmetric roots and a plain SVD, without any code of the project."""
    weight, statistics = random_statistics(9, 14)
    roots = []
    for name in (left, right):
        values, vectors = torch.linalg.eigh(getattr(statistics, name))
        roots.append(vectors @ torch.diag(values.sqrt()) @ vectors.T)
    u, s, vh = torch.linalg.svd(roots[0] @ weight @ roots[1])
    expected = torch.linalg.solve(roots[0], (u[:, :4] * s[:4]) @ vh[:4]) @ torch.linalg.inv(
        roots[1]
    )
    found = truncate(Factorization()(weight, whitening(statistics), "s"), 4).dense()
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_roles_without_the_output_metric_are_whitened_by_their_inputs_alone() -> None:
    weight, statistics = random_statistics(12, 20)
    only_mlp = InputOutput(output_metric_roles=["mlp.*"])

    def truncated(whitening: InputOutput | Input, site: str) -> Tensor:
        named = SiteStatistics(site, statistics.input_metric, kl_metric=statistics.kl_metric)
        return truncate(Factorization()(weight, whitening(named), site), 5).dense()

    q, up = "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj"
    assert_close(truncated(only_mlp, q), truncated(Input(), q))
    assert_close(truncated(only_mlp, up), truncated(InputOutput(), up))
    assert (truncated(InputOutput(), q) - truncated(Input(), q)).abs().max() > 1e-3
    # Their σ² stay in nats: at full strength, tr(C)/m times the error of the outputs.
    named = SiteStatistics(q, statistics.input_metric, kl_metric=statistics.kl_metric)
    left = only_mlp(named).left.diagonal(torch.zeros(12, dtype=DOUBLE))
    assert statistics.kl_metric is not None
    assert_close(left, statistics.kl_metric.diagonal().mean().expand(12))
