"""The closed form of the Hessian's root, and the two estimators, against brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from conftest import build
from torch import Tensor
from torch.testing import assert_close

from iosvd.models.sites import SiteSelection, decoder_blocks, find_sites
from iosvd.statistics.collect import collect
from iosvd.statistics.kl_metric import Estimator, KLMetric, root_times, top_k_probabilities
from iosvd.statistics.needs import Needs

SITE = "model.layers.0.mlp.up_proj"
LENGTH = 3


def kl_hessian(p: Tensor) -> Tensor:
    """The Hessian of KL(p ‖ softmax(z)) at q = p, by autograd from the definition of KL."""
    logits = p.log()

    def divergence(z: Tensor) -> Tensor:
        return (p * (p.log() - z.log_softmax(-1))).sum()

    return torch.autograd.functional.hessian(divergence, logits)


def test_root_of_all_probabilities_squares_to_the_kl_hessian() -> None:
    p = torch.randn(9, dtype=torch.float64).softmax(-1)
    root = root_times(p, torch.eye(9, dtype=torch.float64), complete=True).T
    assert_close(root @ root.T, kl_hessian(p))


@pytest.mark.parametrize("renormalize", [False, True])
def test_root_of_the_top_k_squares_to_the_restricted_hessian(renormalize: bool) -> None:
    logits = 2 * torch.randn(9, dtype=torch.float64)
    p, index = top_k_probabilities(logits, 4, renormalize)
    assert index is not None
    root = root_times(p, torch.eye(4, dtype=torch.float64), renormalize).T
    everything = logits.softmax(-1)
    kept = everything[index] / (everything[index].sum() if renormalize else 1)
    assert_close(root @ root.T, torch.diag(kept) - torch.outer(kept, kept))
    assert set(index.tolist()) == set(everything.argsort(descending=True)[:4].tolist())


@pytest.mark.parametrize("top_k", [0, 31, 40])
def test_top_k_of_the_whole_vocabulary_takes_every_token(top_k: int) -> None:
    p, index = top_k_probabilities(torch.randn(2, 31), top_k, renormalize=False)
    assert index is None
    assert_close(p.sum(-1), torch.ones(2))


@cache
def brute_force(top_k: int, renormalize: bool) -> Tensor:
    """C = (1/N) Σ_s Σ_{t≥s} J_tsᵀ H_t J_ts from the full Jacobian of a small model."""
    model, tokens = build("llama", torch.float64), example()
    site = model.get_submodule(SITE)
    width = site.weight.shape[0]

    def logits_of(shift: Tensor) -> Tensor:
        hook = site.register_forward_hook(lambda module, inputs, y: y + shift)
        result = model(input_ids=tokens).logits[0]
        hook.remove()
        return result

    zero = torch.zeros(LENGTH, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(logits_of, zero)  # (t, vocabulary, s, width)
    metric = torch.zeros(width, width, dtype=torch.float64)
    for t, s in itertools.product(range(LENGTH), repeat=2):
        p = logits_of(zero)[t].detach().softmax(-1)
        chosen = p.argsort(descending=True)[:top_k]
        kept = p[chosen] / (p[chosen].sum() if renormalize else 1)
        hessian = torch.diag(kept) - torch.outer(kept, kept)
        j = jacobian[t, chosen, s]
        metric += j.T @ hessian @ j / LENGTH
        if t < s:
            assert j.abs().max() == 0  # Causal: later outputs move no earlier logits.
    return metric


def example() -> Tensor:
    return torch.tensor([[3, 17, 5]])


@dataclass(frozen=True)
class Enumerated(KLMetric):
    """Takes the `pattern`-th of all sign patterns, so that the mean over patterns is exact."""

    pattern: int = 0

    def signs(self, window: int, length: int, columns: int) -> Tensor:
        shape = super().signs(window, length, columns).shape
        if self.estimator is Estimator.exact:  # One sign a position, the same in every pass.
            bits = torch.tensor([(self.pattern >> i) & 1 for i in range(length)])
            return (2.0 * bits - 1).view(1, length, 1).expand(shape)
        bits = torch.tensor([(self.pattern >> i) & 1 for i in range(length * columns)])
        return (2.0 * bits - 1).view(shape)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("estimator", "patterns"), [(Estimator.probe, 64), (Estimator.exact, 8)])
def test_estimators_have_the_brute_force_metric_as_their_mean(
    estimator: Estimator, patterns: int, renormalize: bool
) -> None:
    """K = 2 and three positions: the probe has 2^6 sign patterns, the exact form 2^3."""
    model = build("llama", torch.float64)
    sites = find_sites(model, SiteSelection(include=[SITE]))
    total = torch.zeros_like(brute_force(2, renormalize))
    for pattern in range(patterns):
        metric = Enumerated(2, renormalize, estimator, pattern=pattern)
        found = collect(model, example(), sites, Needs(kl_metric=metric))[SITE].kl_metric
        assert found is not None
        total += found / patterns
    # RMSNorm works in float32 whatever the dtype of the model.
    assert_close(total, brute_force(2, renormalize), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_random_signs_converge_to_the_brute_force_metric(estimator: Estimator) -> None:
    model = build("llama", torch.float64)
    sites = find_sites(model, SiteSelection(include=[SITE]))
    tokens = example().repeat(512, 1)  # The same window, with fresh signs each time.
    needs = Needs(kl_metric=KLMetric(5, estimator=estimator))
    found = collect(model, tokens, sites, needs, batch_size=64)[SITE].kl_metric
    expected = brute_force(5, False)
    assert found is not None
    assert (found - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize(
    ("metric", "passes"),
    [
        (KLMetric(5), 1),
        (KLMetric(0), 1),
        (KLMetric(5, probes=3), 3),
        (KLMetric(5, estimator=Estimator.exact), 5),
    ],
)
def test_the_probe_takes_one_backward_pass(
    metric: KLMetric, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The check on a few tokens has passes of its own.
    monkeypatch.setattr(
        "iosvd.statistics.passes.chained_blocks", lambda model, _: decoder_blocks(model)
    )
    calls = []
    backward = torch.autograd.backward
    monkeypatch.setattr(
        torch.autograd, "backward", lambda *a, **k: (calls.append(1), backward(*a, **k))
    )
    model = build("llama")
    collect(model, example(), find_sites(model, SiteSelection()), Needs(kl_metric=metric))
    assert len(calls) == passes


def test_signs_depend_on_seed_and_window_only() -> None:
    one = KLMetric(5).signs(3, 7, 5)
    assert torch.equal(one, KLMetric(9).signs(3, 7, 5))
    assert not torch.equal(one, KLMetric(5).signs(4, 7, 5))
    assert not torch.equal(one, KLMetric(5, seed=1).signs(3, 7, 5))
    assert set(one.unique().tolist()) == {-1.0, 1.0}
