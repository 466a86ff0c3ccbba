"""Fisher statistics against autograd, one token or one window at a time."""

from __future__ import annotations

import torch
from conftest import FAMILIES, build
from pytest import mark
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from iosvd.models.sites import SiteSelection, find_sites
from iosvd.statistics.collect import collect
from iosvd.statistics.fisher import FisherMetric, Labels
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.needs import Needs, SiteStatistics

SITE = "model.layers.0.mlp.up_proj"


def tokens(windows: int = 4, length: int = 10) -> Tensor:
    return torch.randint(0, 31, (windows, length), generator=torch.Generator().manual_seed(2))


def window_gradients(family: str, windows: Tensor) -> dict[str, list[Tensor]]:
    """The gradient of the mean loss of each window by itself, by autograd."""
    model = build(family, torch.float64)
    sites = find_sites(model, SiteSelection())
    found: dict[str, list[Tensor]] = {name: [] for name in sites}
    for window in windows:
        model.zero_grad()
        cross_entropy(model(input_ids=window[None]).logits[0, :-1], window[1:]).backward()
        for name, site in sites.items():
            assert site.weight.grad is not None
            found[name].append(site.weight.grad.clone())
    return found


@mark.parametrize("family", FAMILIES)
def test_rows_are_squared_gradients_of_windows(family: str) -> None:
    model = build(family, torch.float64)
    needs = Needs(fisher_rows=True)
    found = collect(model, tokens(), find_sites(model, SiteSelection()), needs, batch_size=3)
    for name, gradients in window_gradients(family, tokens()).items():
        expected = torch.stack([g.square().sum(1) for g in gradients]).mean(0)
        assert_close(found[name].fisher_rows, expected)


def output_gradients(labels: Tensor) -> Tensor:
    """∂(summed loss)/∂y of one site for every token, (tokens, m), by autograd."""
    model, seen = build("llama", torch.float64), []
    hook = model.get_submodule(SITE).register_forward_hook(lambda *call: seen.append(call[-1]))
    logits = model(input_ids=tokens()).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, seen[0])
    hook.remove()
    return gradient.flatten(0, 1)


def metric_of(needs: FisherMetric) -> SiteStatistics:
    model = build("llama", torch.float64)
    sites = find_sites(model, SiteSelection())
    return collect(model, tokens(), sites, Needs(fisher_metric=needs), batch_size=3)[SITE]


def test_empirical_metric_is_the_second_moment_of_output_gradients() -> None:
    g = output_gradients(tokens()[:, 1:])
    assert_close(metric_of(FisherMetric()).fisher_metric, g.T @ g / (4 * 9))


def test_sampled_metric_is_that_of_the_drawn_labels() -> None:
    metric = FisherMetric(Labels.sampled, seed=3)
    model = build("llama", torch.float64)
    with torch.no_grad():
        uniform = torch.stack([metric.uniform(window, 10) for window in range(4)])
        drawn = metric.draw(model(input_ids=tokens()).logits, uniform)[:, :-1]
    g = output_gradients(drawn)
    assert_close(metric_of(metric).fisher_metric, g.T @ g / (4 * 9))


def test_draws_follow_the_prediction() -> None:
    logits = torch.randn(1, 1, 7, generator=torch.Generator().manual_seed(0)) * 2
    many = logits.expand(1, 40_000, 7)
    metric = FisherMetric(Labels.sampled)
    drawn = metric.draw(many, metric.uniform(0, 40_000)[None])
    frequency = drawn.flatten().bincount(minlength=7) / 40_000
    assert_close(frequency, logits.softmax(-1).flatten(), atol=0.01, rtol=0)


def test_a_certain_prediction_is_always_drawn() -> None:
    logits = torch.full((1, 50, 5), -torch.inf)
    logits[..., 4] = 0.0
    metric = FisherMetric(Labels.sampled)
    uniform = metric.uniform(0, 50)[None]
    assert (metric.draw(logits, uniform) == 4).all()
    assert (metric.draw(logits.flip(-1), uniform) == 0).all()


def test_sampled_metric_is_the_kl_metric_of_the_whole_vocabulary_in_expectation() -> None:
    """The score has mean zero under the model's own labels, so cross terms vanish (METHODS 2.3).

    Compared on windows whose last position predicts nothing, which the KL metric counts as well.
    """
    model = build("llama", torch.float64)
    sites = {SITE: model.get_submodule(SITE)}
    windows = tokens(1, 6)
    needs = Needs(kl_metric=KLMetric(top_k=0, probes=4000), fisher_metric=None)
    # The curvature of the last position's logits is not in the loss: mask it by differencing.
    whole = collect(model, windows, sites, needs)[SITE].kl_metric
    draws = [
        collect(model, windows, sites, Needs(fisher_metric=FisherMetric(Labels.sampled, seed)))
        for seed in range(900)
    ]
    mean = torch.stack([d[SITE].fisher_metric for d in draws]).mean(0) * 5  # type: ignore[misc]
    last = last_position(windows)
    assert whole is not None
    error = (mean + last - 6 * whole).norm() / (6 * whole).norm()
    assert error < 0.1


def last_position(windows: Tensor) -> Tensor:
    """Σ_s Jᵀ H J of the last position's logits alone, from full Jacobians."""
    model, seen = build("llama", torch.float64), []
    hook = model.get_submodule(SITE).register_forward_hook(lambda *call: seen.append(call[-1]))
    logits = model(input_ids=windows).logits[0, -1]
    hook.remove()
    p = logits.softmax(-1).detach()
    hessian = torch.diag(p) - torch.outer(p, p)
    rows = [torch.autograd.grad(z, seen[0], retain_graph=True)[0][0] for z in logits]
    jacobian = torch.stack(rows, dim=1)  # (positions, vocabulary, m)
    return sum((j.T @ hessian @ j for j in jacobian), torch.zeros(1, dtype=torch.float64))
