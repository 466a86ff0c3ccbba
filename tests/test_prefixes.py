"""A forward pass that begins at a changed block gives what the whole one does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import FAMILIES, build

import iosvd.models.prefixes
from experiments.small_models import small_model
from iosvd.models.losses import mean_loss
from iosvd.models.prefixes import remember
from iosvd.models.sites import SiteSelection, decoder_blocks, find_sites
from iosvd.windows import Windows

WINDOWS = torch.randint(0, 31, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_whole_pass_to_the_bit(family: str) -> None:
    model = build(family)
    prefixes = remember(model, Windows(WINDOWS), batch_size=2)
    assert set(prefixes.outputs) == {0, 2, 4}
    for name, site in find_sites(model, SiteSelection()).items():
        first = prefixes.first_changed([site])
        assert first == int(name.split("layers.")[1].split(".")[0])
        dense = site.weight.data
        site.weight.data = 0.9 * dense
        whole = mean_loss(model, WINDOWS, 2)
        called: list[int] = []
        hooks = [
            layer.register_forward_hook(partial(_note, called, place))
            for place, block in enumerate(decoder_blocks(model))
            for layer in list(block.children())[:1]
        ]
        part = mean_loss(model, WINDOWS, 2, context=partial(prefixes.from_block, first))
        for hook in hooks:
            hook.remove()
        site.weight.data = dense
        assert part == whole
        assert sorted(set(called)) == list(range(first, 2))
    assert not any("forward" in vars(module) for module in model.modules())


def _note(called: list[int], place: int, *_: object) -> None:
    called.append(place)


def test_layers_outside_the_blocks_begin_at_the_beginning() -> None:
    model = build("llama")
    prefixes = remember(model, Windows(WINDOWS), 2)
    assert prefixes.first_changed([model.lm_head]) == 0
    assert prefixes.first_changed([]) == 2


def test_where_memory_is_short_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(iosvd.models.prefixes, "free_bytes", lambda _: 1000)
    prefixes = remember(model, Windows(WINDOWS), 2)
    assert prefixes.outputs == {}
    context = prefixes.from_block(1, 0)
    with context:
        assert mean_loss(model, WINDOWS, 5) > 0


def test_blocks_that_leave_something_behind_run_whole() -> None:
    """A later block reads the keys and values of an earlier one, which would be skipped."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = small_model("gemma4_text", num_kv_shared_layers=2, layer_types=kinds)
    windows = torch.randint(3, 500, (6, 24), generator=torch.Generator().manual_seed(0))
    assert not remember(model, Windows(windows), 4).outputs
    plain = small_model("gemma2")
    assert remember(plain, Windows(windows), 4).outputs.keys() == {0, 4}
