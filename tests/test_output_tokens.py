"""KFAC-SVD's stabilisers against a direct computation from autograd's gradients (METHODS 11.1)."""

from __future__ import annotations

import dataclasses

import torch
from conftest import build, random_statistics
from pytest import mark, raises
from test_fisher import SITE, output_gradients, tokens
from torch import Tensor
from torch.testing import assert_close

from iosvd.errors import ConfigError
from iosvd.factorization import Factorization, truncate
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.statistics.accumulators import Phase, Sums
from iosvd.statistics.collect import collect
from iosvd.statistics.fisher import FisherMetric
from iosvd.statistics.kl_metric import KLMetric, cotangents
from iosvd.statistics.needs import Needs
from iosvd.statistics.output_tokens import OutputTokens
from iosvd.whitening import Fisher, InputOutput

WINDOWS, LENGTH = 4, 10
CHOICES = [
    OutputTokens(clip_norms=[0.5, 1.2]),
    OutputTokens(left_out=0.2),
    OutputTokens(clip_norms=[0.9, 1.1], left_out=0.125),
]


def direct(windows: Tensor, options: OutputTokens, predictions: int) -> Tensor:
    """The mean over tokens of g gᵀ, one token at a time; `windows` is (windows, tokens, m)."""
    length = windows.shape[1]
    edge = int(options.left_out * length)
    total, count = torch.zeros(windows.shape[-1], windows.shape[-1], dtype=windows.dtype), 0
    for window in windows:
        kept = [window[t] for t in range(edge, length - edge)]
        norms = [float(g.norm()) for g in kept if g.norm() > 1e-10 * length]
        mean = sum(norms) / len(norms)
        for position, g in zip(range(edge, length - edge), kept, strict=True):
            norm, factor = float(g.norm()), 1.0
            if options.clip_norms is not None and norm > 1e-10 * length:
                least, greatest = options.clip_norms
                factor = min(max(norm, least * mean), greatest * mean) / norm
            total += factor**2 * torch.outer(g, g)
            count += position < predictions
    return total / count


def found(needs: Needs, batch_size: int = 3) -> Tensor:
    model = build("llama", torch.float64)
    sites = find_sites(model, SiteSelection())
    statistics = collect(model, tokens(), sites, needs, batch_size=batch_size)[SITE]
    metric = statistics.kl_metric if needs.kl_metric else statistics.fisher_metric
    assert metric is not None
    return metric


@mark.parametrize("options", CHOICES)
def test_fisher_metric_is_that_of_the_chosen_and_clipped_gradients(options: OutputTokens) -> None:
    g = output_gradients(tokens()[:, 1:])
    windows = torch.zeros(WINDOWS, LENGTH, g.shape[1], dtype=g.dtype)
    # The last position predicts nothing, and no other position's loss reaches it.
    windows[:, :-1] = g.reshape(WINDOWS, LENGTH, -1)[:, :-1]
    expected = direct(windows, options, LENGTH - 1)
    assert_close(found(Needs(fisher_metric=FisherMetric(tokens=options))), expected)


@mark.parametrize("options", CHOICES)
def test_kl_metric_is_that_of_the_chosen_and_clipped_cotangents(options: OutputTokens) -> None:
    metric = KLMetric(top_k=4, tokens=options)
    model, seen = build("llama", torch.float64), list[Tensor]()
    hook = model.get_submodule(SITE).register_forward_hook(lambda *call: seen.append(call[-1]))
    logits = model(input_ids=tokens()).logits
    signs = torch.stack([metric.signs(i, LENGTH, 4) for i in range(WINDOWS)], dim=1)
    (scalar,) = cotangents(logits, metric, signs)
    (windows,) = torch.autograd.grad(scalar, seen[0])
    hook.remove()
    assert_close(found(Needs(kl_metric=metric)), direct(windows, options, LENGTH))


def test_by_default_the_metric_is_the_mean_over_all_tokens() -> None:
    plain = found(Needs(fisher_metric=FisherMetric()))
    wide = FisherMetric(tokens=OutputTokens(clip_norms=[0.0, 1e9]))
    assert_close(found(Needs(fisher_metric=wide)), plain)


def test_batches_do_not_change_the_stabilised_metric() -> None:
    needs = Needs(fisher_metric=FisherMetric(tokens=CHOICES[2]))
    assert_close(found(needs, batch_size=1), found(needs, batch_size=4))


def test_tokens_without_a_gradient_stay_as_they_are() -> None:
    silent = torch.zeros(1, 8, 3)
    silent[0, 3] = torch.tensor([3.0, 0.0, 4.0])
    rows = OutputTokens(clip_norms=[0.5, 1.0]).rows(silent)
    assert_close(rows, silent[0])


@mark.parametrize("kind", [Fisher, InputOutput])
def test_shrinkage_is_the_mixture_with_the_mean(kind: type[Fisher] | type[InputOutput]) -> None:
    """Written out, and against the damping that gives the same weight."""
    weight, statistics = random_statistics(9, 14)
    name = "fisher_metric" if kind is Fisher else "kl_metric"
    shrunk = dataclasses.replace(
        statistics,
        input_metric=mixed(statistics.input_metric, 0.1),
        **{name: mixed(getattr(statistics, name), 0.3)},
    )
    plain = kind(damping_input=0.0, damping_output=0.0)
    whitening = dataclasses.replace(plain, shrinkage_input=0.1, shrinkage_output=0.3)
    damped = kind(damping_input=0.1 / 0.9, damping_output=0.3 / 0.7)

    def truncated(whitener: object) -> Tensor:
        return truncate(Factorization()(weight, whitener, "s"), 4).dense()  # type: ignore[arg-type]

    assert_close(truncated(whitening(statistics)), truncated(plain(shrunk)))
    assert_close(truncated(whitening(statistics)), truncated(damped(statistics)))


def mixed(metric: Tensor | None, share: float) -> Tensor:
    assert metric is not None
    return (1 - share) * metric + share * metric.diagonal().mean() * torch.eye(len(metric)).to(
        metric
    )


def test_scaled_cotangents_may_exceed_float16() -> None:
    """Rounding noise beside a large cotangent, lifted to a tenth of the mean."""
    cotangents = torch.zeros(1, 4, 2, dtype=torch.float16)
    cotangents[0, :, 0] = torch.tensor([6e-8, 60_000, 60_000, 60_000])
    rows = OutputTokens(clip_norms=[0.1, 10.0]).rows(cotangents)
    assert rows.dtype == torch.float32
    assert_close(rows[:, 0], torch.tensor([4500.0, 6e4, 6e4, 6e4]), rtol=0.01, atol=0)


def test_a_stabilised_metric_predicts_no_divergence() -> None:
    assert InputOutput().predicts_kl
    assert not InputOutput(shrinkage_output=0.1).predicts_kl
    assert not InputOutput(shrinkage_input=0.1).predicts_kl
    assert not InputOutput(clip_norms=[0.1, 10.0]).predicts_kl
    assert not InputOutput(left_out=0.1).predicts_kl


@mark.parametrize(
    ("options", "message"),
    [
        ({"left_out": 0.5}, "left_out=0.5 leaves no token of a window"),
        ({"left_out": -0.1}, "left_out=-0.1 is below 0"),
        ({"clip_norms": [2.0, 3.0]}, r"clip_norms=\[2.0, 3.0\] is no range"),
        ({"clip_norms": [0.1]}, r"clip_norms=\[0.1\] is no range"),
        ({"shrinkage_input": 1.5}, r"shrinkage_input=1.5 is outside \[0, 1\]"),
        ({"shrinkage_output": -1.0}, r"shrinkage_output=-1 is outside \[0, 1\]"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], message: str) -> None:
    with raises(ConfigError, match=message):
        InputOutput(**options)  # type: ignore[arg-type]


def test_a_layer_that_sees_some_tokens_has_no_windows_to_choose_in() -> None:
    sums = Sums(Needs(kl_metric=KLMetric(tokens=CHOICES[0])), shared={"expert": "expert"})
    sums.phase, sums.windows, sums.length = Phase.KL, 2, 5
    with raises(ConfigError, match="expert sees only some tokens of a window"):
        sums.see_cotangent("expert", None, torch.ones(7, 3))
