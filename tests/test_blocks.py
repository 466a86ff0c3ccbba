"""Hidden states carried from block to block are those of the model's own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build
from torch.testing import assert_close

import iosvd.models.blocks
from iosvd.models.blocks import calls_of, capture_input, hidden_states_of, layout_of
from iosvd.models.sites import decoder_blocks

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
    carried = hidden_states_of(model, WINDOWS, 2, limit)
    for block, calls, states in zip(blocks, calls_of(model, WINDOWS, 2), expected, strict=True):
        assert set(calls) == {1, 2}
        carried.pass_(block, calls)
        assert_close(carried.states, states)


@pytest.mark.parametrize("family", SITES)
@torch.no_grad()
def test_the_layout_of_a_block_is_found_by_running_it(family: str) -> None:
    model = build(family)
    block, calls = decoder_blocks(model)[0], calls_of(model, WINDOWS, 5)[0]
    hidden = hidden_states_of(model, WINDOWS, 5).states
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
    block, calls = decoder_blocks(model)[0], calls_of(model, WINDOWS, 5)[0]
    hidden = hidden_states_of(model, WINDOWS, 5).states
    *before, last = WRITERS[family]
    x, stream = capture_input(block, hidden, calls[5], last, before)
    assert_close(stream + block.get_submodule(last)(x).reshape_as(stream), calls[5](block, hidden))


def test_states_beyond_the_limit_lie_in_a_file_that_nobody_else_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iosvd.models.blocks.tempfile, "tempdir", str(tmp_path))
    with torch.no_grad():
        carried = hidden_states_of(build("llama"), WINDOWS, 2, limit_bytes=0)
    assert not list(tmp_path.iterdir())
    carried.states.add_(1)  # Still there, and writable.
    assert torch.isfinite(carried.states).all()
