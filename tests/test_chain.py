"""Gradients that go back block by block are those of the whole graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build
from test_statistics import EVERYTHING, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import iosvd.statistics.collect as collecting
import iosvd.statistics.passes as passing
from iosvd.errors import ModelError
from iosvd.models.chain import chained_blocks, without_graph
from iosvd.models.forward import activation_gradients
from iosvd.models.sites import SiteSelection, decoder_blocks, find_sites
from iosvd.statistics.needs import STATISTICS, Needs, SiteStatistics
from iosvd.windows import Windows

families = pytest.mark.parametrize("family", FAMILIES)


def statistics(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> dict[str, SiteStatistics]:
    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(passing, "chained_blocks", lambda *_: [])
        sites = find_sites(model, SiteSelection())
        return collecting.collect(model, tokens(), sites, EVERYTHING, batch_size=4)


def chained(model: PreTrainedModel) -> list[torch.nn.Module]:
    with activation_gradients(model):
        return chained_blocks(model, Windows(tokens()))


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
    """Two gradients go through a block; its graph is freed before the next block has one."""
    model = build("llama")
    blocks = decoder_blocks(model)
    graphs: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def see(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            graphs.append(node_of(output))
            alive.append(sum(graph() is not None for graph in graphs))

    for block in blocks:
        block.mlp.down_proj.register_forward_hook(see)
    with activation_gradients(model):
        with without_graph(blocks) as chain:
            logits = model(input_ids=tokens()).logits
        assert not graphs
        chain.back(logits, [torch.ones_like(logits), logits.detach()], lambda _: None)
    assert alive == [1, 1]


class Node:
    """Lives as long as a node of a graph."""


def node_of(output: Tensor) -> weakref.ref[Node]:
    assert output.grad_fn is not None
    output.grad_fn.metadata["node"] = node = Node()
    return weakref.ref(node)


def leaking(model: PreTrainedModel, share: float = 1.0) -> None:
    """The second block also adds what the first one's layer wrote."""
    first, second = decoder_blocks(model)
    written: list[Tensor] = []
    first.mlp.down_proj.register_forward_hook(lambda *call: written.append(call[-1]))
    second.register_forward_hook(lambda *call: call[-1] + share * written[-1])


def writing_over_its_input(model: PreTrainedModel) -> None:
    def halve(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        given[0].mul_(0.5)

    decoder_blocks(model)[1].register_forward_pre_hook(halve)


def called_by_name(model: PreTrainedModel) -> None:
    second = decoder_blocks(model)[1]
    plain = second.forward
    second.forward = lambda **named: plain(**named)
    second.register_forward_pre_hook(
        lambda _, given, named: ((), {"hidden_states": given[0], **named}), with_kwargs=True
    )


def holding_a_longer_list(model: PreTrainedModel) -> None:
    """Experts, for instance: more modules than there are blocks, side by side."""
    model.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(5))
    first = decoder_blocks(model.model)[0]
    first.register_forward_hook(lambda *call: call[-1] + model.experts[3](call[-1]))


@pytest.mark.parametrize(
    "change", [leaking, writing_over_its_input, called_by_name, holding_a_longer_list]
)
def test_blocks_that_are_no_chain_keep_their_graph(
    change: Callable[[PreTrainedModel], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama")
    change(model)
    assert chained(model) == []
    with caplog.at_level("INFO"):
        sites = find_sites(model, SiteSelection())
        collecting.collect(model, tokens(), sites, Needs(kl_metric=EVERYTHING.kl_metric))
    assert "the activations of all of them are kept" in caplog.text
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_small_leak_is_found_in_half_precision(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    assert chained(model) == decoder_blocks(model)
    leaking(model, share=0.1)
    assert chained(model) == []


def test_inputs_of_a_last_block_without_a_norm_behind_it_count_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head reads what the last block returned, the same tensor."""
    model = build("llama")
    model.model.norm = nn.Identity()
    monkeypatch.setattr(passing, "separate_head", lambda *_: model.lm_head)

    def forward(**named: Any) -> Any:
        hidden = model.model(input_ids=named["input_ids"]).last_hidden_state
        return SimpleNamespace(logits=model.lm_head(hidden))

    model.forward = forward
    one, other = (statistics(model, monkeypatch, whole=whole) for whole in (False, True))
    for name in one:
        for field in STATISTICS:
            assert torch.equal(getattr(one[name], field), getattr(other[name], field)), field


def test_a_site_that_no_gradient_reaches_is_named() -> None:
    model = build("llama")
    up = decoder_blocks(model)[0].mlp.up_proj
    up.register_forward_hook(lambda *call: call[-1].detach())
    sites = find_sites(model, SiteSelection())
    with pytest.raises(ModelError, match=r"no gradient reaches model.layers.0.mlp.up_proj; exclu"):
        collecting.collect(model, tokens(), sites, Needs(kl_metric=EVERYTHING.kl_metric))


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
