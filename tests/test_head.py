"""Statistics do not depend on how many logits are computed at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, build
from torch import nn
from torch.testing import assert_close

import iosvd.statistics.collect as collecting
import iosvd.statistics.passes as passing
from iosvd.errors import NumericalError
from iosvd.models.head import has_plain_head, separate_head
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.statistics.fisher import FisherMetric, Labels
from iosvd.statistics.kl_metric import Estimator, KLMetric
from iosvd.statistics.needs import STATISTICS, Needs
from iosvd.windows import Windows

TOKENS = torch.randint(0, 31, (5, 11), generator=torch.Generator().manual_seed(4))
INNER = torch.tensor([4])
NEEDS = {
    "io_svd": Needs(input_metric=True, kl_metric=KLMetric(), gradient_windows=3),
    "whole vocabulary": Needs(kl_metric=KLMetric(0, probes=2), fisher_rows=True),
    "exact": Needs(kl_metric=KLMetric(3, estimator=Estimator.exact)),
    "sampled": Needs(fisher_metric=FisherMetric(Labels.sampled), kronecker_passes=2),
    "inputs": Needs(input_metric=True, input_magnitude=True),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NEEDS)
def test_chunks_of_logits_give_the_same_statistics(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all logits at once, by the model's own forward pass."""
    model = build(family, torch.float64)
    sites = find_sites(model, SiteSelection())
    assert separate_head(model, Windows(TOKENS)) is model.get_output_embeddings()
    monkeypatch.setattr(passing, "CHUNK_ENTRIES", 2 * 3 * 31)  # Three positions of two windows.
    chunked = collecting.collect(model, TOKENS, sites, NEEDS[name], batch_size=2)
    monkeypatch.setattr(passing, "separate_head", lambda *_: None)
    whole = collecting.collect(model, TOKENS, sites, NEEDS[name], batch_size=2)
    for site in sites:
        for statistic in STATISTICS:
            one, other = getattr(chunked[site], statistic), getattr(whole[site], statistic)
            assert (one is None) == (other is None)
            if one is not None:
                assert_close(one, other, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "change"),
    [(torch.float32, lambda logits: logits / 2), (torch.bfloat16, torch.Tensor.float)],
    ids=["scaled", "cast"],
)
def test_logits_that_change_after_the_head_are_taken_whole(
    dtype: torch.dtype, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Cast logits have the head's values, but another type."""
    model = build("llama", dtype)
    plain = model.forward

    def changed(*arguments: object, **options: object) -> object:
        output = plain(*arguments, **options)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    assert separate_head(model, Windows(TOKENS)) is None
    found = collecting.collect(model, TOKENS, find_sites(model, SiteSelection()), NEEDS["io_svd"])
    assert all(statistics.kl_metric is not None for statistics in found.values())


def test_a_plan_knows_which_logits_are_changed_after_the_head() -> None:
    assert has_plain_head(build("llama").config)
    assert not has_plain_head(SimpleNamespace(final_logit_softcapping=30.0))
    assert not has_plain_head(SimpleNamespace(logit_scale=0.0625))
    assert has_plain_head(SimpleNamespace(logits_scaling=1.0))


@pytest.mark.parametrize("name", ["io_svd", "sampled"])
def test_a_last_chunk_of_one_position_has_no_label(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", torch.float64)
    sites = find_sites(model, SiteSelection())
    whole = collecting.collect(model, TOKENS, sites, NEEDS[name], batch_size=2)
    monkeypatch.setattr(passing, "CHUNK_ENTRIES", 2 * 5 * 31)  # 11 = 5 + 5 + 1.
    chunked = collecting.collect(model, TOKENS, sites, NEEDS[name], batch_size=2)
    for site in sites:
        for statistic in STATISTICS:
            if (one := getattr(whole[site], statistic)) is not None:
                assert_close(getattr(chunked[site], statistic), one, rtol=1e-9, atol=1e-14)


def test_an_overflow_within_a_window_is_an_error_without_a_backward_pass_too() -> None:
    model = build("llama")
    model.model.norm.register_forward_hook(lambda *call: call[-1].index_fill(1, INNER, torch.inf))
    with pytest.raises(
        NumericalError, match=r"the logits of calibration windows 0 to [24] have NaN"
    ):
        collecting.collect(model, TOKENS, find_sites(model, SiteSelection()), NEEDS["inputs"])


def test_a_head_that_is_a_site_is_seen_on_whole_batches() -> None:
    model = build("llama", torch.float64)
    sites: dict[str, nn.Module] = {"lm_head": model.lm_head}
    found = collecting.collect(model, TOKENS, sites, Needs(input_metric=True, kl_metric=KLMetric()))
    hidden = model.model(input_ids=TOKENS).last_hidden_state.detach().flatten(0, 1)
    assert_close(found["lm_head"].input_metric, hidden.T @ hidden / len(hidden))


@pytest.mark.parametrize("name", ["io_svd", "inputs"])
def test_a_head_with_nan_is_an_error(name: str) -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(
        NumericalError, match=r"the logits of calibration windows 0 to [24] have NaN"
    ):
        collecting.collect(model, TOKENS, find_sites(model, SiteSelection()), NEEDS[name])
