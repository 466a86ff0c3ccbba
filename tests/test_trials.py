"""Ranks are tried on the calibration set without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build
from torch.nn.functional import cross_entropy

from iosvd.allocation import Learned, Spectral, Uniform
from iosvd.allocation.objective import Predictions
from iosvd.budget import Budget
from iosvd.cache.calibration import Calibration
from iosvd.errors import NumericalError
from iosvd.layers.replacement import truncated_weights
from iosvd.method import Method
from iosvd.pipeline import factorize
from iosvd.trials import TruncationTrials
from iosvd.whitening import Input

TOKENS = torch.randint(0, 31, (6, 12), generator=torch.Generator().manual_seed(1))


def trial(batch_size: int = 4) -> TruncationTrials:
    model = build("llama")
    calibration = Calibration.of(model, TOKENS, batch_size=batch_size)
    spectra = factorize(model, TOKENS, method=Method(Input(), Spectral())).spectra
    return TruncationTrials(calibration, spectra, Budget(calibration.shapes, 0.6))


def test_the_loss_is_that_of_a_model_with_the_truncated_weights() -> None:
    tried = trial()
    ranks = {"model.layers.0.mlp.up_proj": 3, "model.layers.1.self_attn.q_proj": 2}
    found = tried.loss(ranks, windows=5)
    model = copy.deepcopy(tried.calibration.model)
    for name, rank in ranks.items():
        spectrum = tried.spectra[name]
        weight = spectrum.left[:, :rank] @ spectrum.right[:rank]
        model.get_submodule(name).weight.data.copy_(weight)
    with torch.no_grad():
        logits = model(input_ids=TOKENS[:5]).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:5, 1:].flatten())
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert tried.tokens == 72


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_divergence_is_that_of_the_chosen_predictions(batch_size: int) -> None:
    tried = trial(batch_size)
    ranks = {"model.layers.0.mlp.up_proj": 3, "model.layers.1.self_attn.q_proj": 2}
    found = tried.divergence(ranks, 5, Predictions(first_position=4, temperature=0.6))
    model = copy.deepcopy(tried.calibration.model)
    with torch.no_grad():
        dense = (model(input_ids=TOKENS[:5]).logits[:, 4:] / 0.6).softmax(-1)
        for name, rank in ranks.items():
            spectrum = tried.spectra[name]
            weight = spectrum.left[:, :rank] @ spectrum.right[:rank]
            model.get_submodule(name).weight.data.copy_(weight)
        cut = (model(input_ids=TOKENS[:5]).logits[:, 4:] / 0.6).softmax(-1)
    expected = (dense * (dense.log() - cut.log())).sum(-1).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert tried.divergence({}, 0, Predictions()) == pytest.approx(0, abs=1e-12)


def test_a_divergence_that_is_not_finite_is_an_error() -> None:
    tried = trial()
    tried.calibration.model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match=r"divergence with .*up_proj truncated is not finite"):
        tried.divergence({"model.layers.0.mlp.up_proj": 3}, 0, Predictions())


def test_a_rank_above_break_even_is_dense_and_0_windows_are_all() -> None:
    tried = trial()
    with torch.no_grad():
        logits = tried.calibration.model(input_ids=TOKENS).logits
    dense = cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    full = {name: min(site.weight.shape) for name, site in tried.calibration.sites.items()}
    assert tried.loss(full, windows=0) == pytest.approx(float(dense), rel=1e-6)
    assert tried.loss({}, windows=0) == pytest.approx(float(dense), rel=1e-6)


def test_the_weights_are_put_back_even_if_the_trial_fails() -> None:
    tried = trial()
    name = "model.layers.0.mlp.up_proj"
    before = tried.calibration.sites[name].weight.data
    copied = before.clone()
    with (
        pytest.raises(KeyError),
        truncated_weights(tried.calibration.sites, tried.spectra, {name: 2}),
    ):
        assert not torch.equal(tried.calibration.sites[name].weight, copied)
        raise KeyError
    assert tried.calibration.sites[name].weight.data.data_ptr() == before.data_ptr()
    assert torch.equal(tried.calibration.sites[name].weight, copied)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    tried = trial()
    tried.calibration.model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match="loss of windows 0 to 3 is NaN"):
        tried.loss({}, windows=0)


def test_gates_of_one_are_the_dense_model_and_their_derivative_is_that_of_the_loss() -> None:
    tried = trial()
    site, chosen = "model.layers.1.mlp.down_proj", torch.tensor([0, 3, 4])
    count = len(tried.spectra[site].right)
    whole = torch.ones(count, requires_grad=True)
    # A spectrum is cut at its break-even rank; what is left of it stands for the weight.
    with torch.no_grad(), truncated_weights(tried.calibration.sites, tried.spectra, {site: count}):
        logits = tried.calibration.model(input_ids=TOKENS[chosen]).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[chosen, 1:].flatten())
    loss = tried.gated_loss({site: whole}, chosen)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert whole.grad is not None
    step = torch.zeros(count)
    step[0] = 1e-2
    above, below = (
        float(tried.gated_loss({site: whole.detach() + sign * step}, chosen)) for sign in (1, -1)
    )
    assert float(whole.grad[0]) == pytest.approx((above - below) / 2e-2, rel=2e-2)
    assert not vars(tried.calibration.sites[site]).get("forward")


def test_learned_ranks_do_better_than_those_they_start_from() -> None:
    tried = trial()
    uniform = Uniform()(tried.spectra, tried.budget, tried)
    learned = Learned()(tried.spectra, tried.budget, tried)
    assert tried.budget.cost(learned) <= tried.budget.limit
    assert tried.loss(learned, windows=0) < tried.loss(uniform, windows=0)
