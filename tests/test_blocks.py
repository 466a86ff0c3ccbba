"""Hidden states carried from block to block are those of the model's own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build
from torch.testing import assert_close

import iosvd.models.blocks
from experiments.small_models import small_model
from iosvd.errors import ModelError
from iosvd.models.blocks import calls_of, hidden_states_of
from iosvd.models.calls import capture_input
from iosvd.models.layout import layout_of
from iosvd.models.sites import decoder_blocks
from iosvd.windows import Windows

WINDOWS = torch.randint(0, 31, (5, 12), generator=torch.Generator().manual_seed(1))
SITES = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    " mlp.gate_proj mlp.up_proj mlp.down_proj",
    "opt": "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj fc1 fc2",
    "gpt_neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
}
WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


@pytest.mark.parametrize("limit", [None, 0], ids=["in memory", "in a file"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_carried_is_what_the_model_computes(family: str, limit: float | None) -> None:
    model = build(family)
    seen: list[torch.Tensor] = []
    blocks = decoder_blocks(model)
    for block in blocks:
        block.register_forward_hook(
            lambda *call: seen.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1])
        )
    model(input_ids=WINDOWS, use_cache=False)
    expected = list(seen)
    carried = hidden_states_of(model, Windows(WINDOWS), 2, limit)
    for block, calls, states in zip(
        blocks, calls_of(model, Windows(WINDOWS), 2), expected, strict=True
    ):
        assert set(calls) == {1, 2}
        carried.pass_(block, calls)
        assert_close(carried.states, states)


@pytest.mark.parametrize("family", SITES)
@torch.no_grad()
def test_the_layout_of_a_block_is_found_by_running_it(family: str) -> None:
    model = build(family)
    block, calls = decoder_blocks(model)[0], calls_of(model, Windows(WINDOWS), 5)[0]
    hidden = hidden_states_of(model, Windows(WINDOWS), 5).states
    sites = SITES[family].split()
    layout = layout_of(block, hidden, calls[5], sites)
    assert layout.writers == WRITERS[family]
    assert sorted(name for group in layout.groups for name in group) == sorted(sites)
    together = {frozenset(group) for group in layout.groups}
    if family == "llama":
        assert frozenset(sites[:3]) in together
        assert frozenset(sites[4:6]) in together


@pytest.mark.parametrize("family", SITES)
@torch.no_grad()
def test_stream_and_output_add_up_to_what_the_block_returns(family: str) -> None:
    model = build(family)
    block, calls = decoder_blocks(model)[0], calls_of(model, Windows(WINDOWS), 5)[0]
    hidden = hidden_states_of(model, Windows(WINDOWS), 5).states
    *before, last = WRITERS[family]
    x, stream = capture_input(block, hidden, calls[5], last, before)
    assert_close(stream + block.get_submodule(last)(x).reshape_as(stream), calls[5](block, hidden))


def test_states_beyond_the_limit_lie_in_a_file_that_nobody_else_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iosvd.models.blocks.tempfile, "tempdir", str(tmp_path))
    with torch.no_grad():
        carried = hidden_states_of(build("llama"), Windows(WINDOWS), 2, limit_bytes=0)
    assert not list(tmp_path.iterdir())
    carried.states.add_(1)  # Still there, and writable.
    assert torch.isfinite(carried.states).all()


@pytest.mark.parametrize("layers", [0, 2], ids=["embeddings of layers", "and shared keys"])
def test_blocks_that_get_more_than_hidden_states_are_refused(layers: int) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = small_model("gemma4_text", num_kv_shared_layers=layers, layer_types=kinds)
    tokens = torch.randint(3, 500, (8, 24), generator=torch.Generator().manual_seed(0))
    for batch in (8, 4):
        with pytest.raises(ModelError, match=r"get more from each other or.*choose"):
            calls_of(model, Windows(tokens), batch)


def test_blocks_that_share_layers_are_refused() -> None:
    model = build("llama")
    first, second = decoder_blocks(model)
    second.mlp = first.mlp
    with pytest.raises(ModelError, match="blocks of LlamaForCausalLM share layers"):
        calls_of(model, Windows(WINDOWS), 5)


def test_the_blocks_are_the_list_with_most_weights() -> None:
    """Not a list of norms, one for each of more heads than layers; nor of one class."""
    model = small_model("stablelm", qk_layernorm=True, num_hidden_layers=2)
    assert decoder_blocks(model) == list(model.model.layers)
    hybrid = small_model("falcon_h1")
    assert decoder_blocks(hybrid) == list(hybrid.model.layers)
    mixed = small_model("nemotron_h")
    blocks = decoder_blocks(mixed)
    assert blocks == list(mixed.model.layers)
    assert len(blocks) == mixed.config.num_hidden_layers
