"""The exact KL divergence against torch's own, and the change of the loss against two losses."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import build
from torch.nn.functional import cross_entropy, kl_div

from iosvd.allocation import Spectral
from iosvd.errors import NumericalError
from iosvd.evaluation.divergence import divergence, divergences
from iosvd.layers.replacement import truncated_weights
from iosvd.method import Method
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import factorize
from iosvd.whitening import Input

WINDOWS = torch.randint(0, 31, (5, 12), generator=torch.Generator().manual_seed(1))


def changed(scale: float) -> torch.nn.Module:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(scale)
    return model


@torch.no_grad()
def test_it_is_the_mean_divergence_over_all_positions() -> None:
    dense, other = build("llama"), changed(0.7)
    found = divergence(dense, other, WINDOWS, batch_size=2)  # type: ignore[arg-type]
    p, q = (m(input_ids=WINDOWS).logits.double().log_softmax(-1) for m in (dense, other))
    expected = kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(float(expected), rel=1e-9)
    labels = WINDOWS[:, 1:].flatten()
    before, after = (cross_entropy(x[:, :-1].flatten(0, 1), labels) for x in (p, q))
    assert found.loss_change == pytest.approx(float(after - before), rel=1e-9)
    assert found.kl > 0


def test_the_dense_model_does_not_diverge_from_itself() -> None:
    found = divergence(build("llama"), build("llama"), WINDOWS, batch_size=5)
    assert (found.kl, found.loss_change) == (0, 0)


def test_variants_of_the_dense_model_are_measured_one_by_one() -> None:
    dense = build("llama")
    sites = find_sites(dense, SiteSelection())
    spectra = factorize(dense, WINDOWS, method=Method(Input(), Spectral())).spectra
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    variants = {n: (dense, partial(truncated_weights, sites, spectra, {n: 2})) for n in names}
    found = divergences(dense, {"none": (dense, nullcontext), **variants}, WINDOWS, batch_size=2)
    assert found["none"].kl == 0
    for name in names:
        alone = build("llama")
        weight = spectra[name].left[:, :2] @ spectra[name].right[:2]
        alone.get_submodule(name).weight.data.copy_(weight)
        expected = divergence(build("llama"), alone, WINDOWS, batch_size=5)
        assert found[name].kl == pytest.approx(expected.kl, rel=1e-5)
        assert found[name].loss_change == pytest.approx(expected.loss_change, rel=1e-4, abs=1e-9)


def test_infinity_is_an_error_that_names_the_variant() -> None:
    broken = changed(float("nan"))
    with pytest.raises(NumericalError, match="divergence of the compressed model is not finite"):
        divergence(build("llama"), broken, WINDOWS, batch_size=5)  # type: ignore[arg-type]
