"""Gradients that go back block by block are those of the whole graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build
from test_statistics import EVERYTHING, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import iosvd.statistics.collect as collecting
from iosvd.models.chain import chained_blocks, without_graph
from iosvd.models.forward import activation_gradients
from iosvd.models.sites import SiteSelection, decoder_blocks, find_sites
from iosvd.statistics.needs import STATISTICS, SiteStatistics

families = pytest.mark.parametrize("family", FAMILIES)


def statistics(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> dict[str, SiteStatistics]:
    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(collecting, "chained_blocks", lambda *_: [])
        sites = find_sites(model, SiteSelection())
        return collecting.collect(model, tokens(), sites, EVERYTHING, batch_size=4)


def chained(model: PreTrainedModel) -> list[torch.nn.Module]:
    with activation_gradients(model):
        return chained_blocks(model, tokens())


@families
def test_statistics_are_those_of_the_whole_graph(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: what is computed again is computed by the same operations."""
    model = build(family)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    assert chained(model) == decoder_blocks(model)
    one, other = (statistics(model, monkeypatch, whole=whole) for whole in (False, True))
    for name in one:
        for field in STATISTICS:
            assert torch.equal(getattr(one[name], field), getattr(other[name], field)), field
    assert not any("forward" in vars(module) for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked


def test_one_block_at_a_time_has_a_graph() -> None:
    model = build("llama")
    blocks = decoder_blocks(model)
    kept: dict[int, int] = {}  # Outputs with a graph that are alive, by block.
    most = 0

    def see(number: int, _: Any, __: Any, output: Tensor) -> None:
        nonlocal most
        if output.requires_grad:
            kept[number] = kept.get(number, 0) + 1
            most = max(most, sum(kept.values()))
            output.grad_fn.register_prehook(lambda *_: kept.pop(number) and None)

    for number, block in enumerate(blocks):
        block.mlp.down_proj.register_forward_hook(partial(see, number))
    with activation_gradients(model):
        with without_graph(blocks) as chain:
            logits = model(input_ids=tokens()).logits
        assert not kept
        chain.back(logits, [torch.ones_like(logits)], lambda _: None)
    assert most == 1 and not kept


def remembering(model: PreTrainedModel) -> None:
    """The second block also adds what the first one's layer wrote."""
    first, second = decoder_blocks(model)
    written: list[Tensor] = []
    first.mlp.down_proj.register_forward_hook(lambda *call: written.append(call[-1]))
    second.register_forward_hook(lambda *call: call[-1] + written[-1])


def test_blocks_that_are_no_chain_keep_their_graph(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    remembering(model)
    with caplog.at_level("INFO"):
        assert chained(model) == []
    assert "the activations of all of them are kept" in caplog.text


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma2", {}),  # Norms after the additions, and capped logits.
        ("gemma4_text", {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}),
    ],
    ids=["gemma2", "inputs of every layer"],
)
def test_other_families_have_the_statistics_of_the_whole_graph(
    family: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = dict(vocab_size=64, hidden_size=16, intermediate_size=24, head_dim=8)
    heads = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    kinds = ["full_attention", "full_attention"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **widths, **heads, layer_types=kinds, **more)
    ).eval()
    assert bool(chained(model)) == (not more)
    one, other = (statistics(model, monkeypatch, whole=whole) for whole in (False, True))
    for name in one:
        assert torch.equal(one[name].need("kl_metric"), other[name].need("kl_metric"))


def test_a_block_that_is_called_twice_is_visited_twice() -> None:
    """The last hidden states go through the last block again."""
    model = build("llama", torch.float64)
    last = decoder_blocks(model)[1]
    gradients = []
    for blocks in ([], decoder_blocks(model)):
        with activation_gradients(model):
            hidden = torch.ones(1, 3, 16, dtype=torch.float64, requires_grad=True)
            place = torch.arange(3)[None]
            rope = model.model.rotary_emb(hidden, place)
            with without_graph(blocks) as chain:
                output = last(last(hidden * 1, position_embeddings=rope), position_embeddings=rope)
            assert len(chain.visits) == len(blocks)
            chain.back(output, [torch.ones_like(output)], lambda _: None)
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)
