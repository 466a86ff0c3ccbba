"""Blocks that live in main memory: one at a time is on the device, with the same results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build
from test_chain import node_of
from test_execution import overrides, source  # noqa: F401 (a fixture)
from test_statistics import EVERYTHING, tokens
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from experiments import plan
from iosvd import compress
from iosvd.errors import ConfigError, NumericalError
from iosvd.evaluation.perplexity import perplexity
from iosvd.models.sites import SiteSelection, decoder_blocks, find_sites
from iosvd.models.visiting import Guest, device_of, present, visit_, visitor_bytes
from iosvd.statistics.collect import collect
from iosvd.statistics.needs import STATISTICS
from iosvd.windows import Windows

families = pytest.mark.parametrize("family", FAMILIES)
CPU = torch.device("cpu")


@dataclass
class Device:
    """A device of limited memory: weights are NaN except for the copies that were sent to it."""

    limit_bytes: int
    values: dict[int, Tensor] = field(default_factory=dict)  # By the address of the tensor at home.
    there: dict[int, int] = field(default_factory=dict)  # Bytes of the copies, by guest.
    most_bytes: int = 0

    def host(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the model's blocks visit this device."""
        visit_(model, CPU)
        for block in decoder_blocks(model):
            for tensor in [*block.parameters(), *block.buffers()]:
                self.values[tensor.data_ptr()] = tensor.detach().clone()
                tensor.data.fill_(torch.nan)
        leave = Guest.leave

        def sent(guest: Guest, home: Tensor) -> Tensor:
            copy = self.values[home.data_ptr()].clone()
            if guest._visits:  # Else one weight of a graph, until its gradient is computed.
                self.there[id(guest)] = self.there.get(id(guest), 0) + copy.nbytes
            self.most_bytes = max(self.most_bytes, sum(self.there.values()))
            assert self.most_bytes <= self.limit_bytes, "out of memory"
            return copy

        def left(guest: Guest) -> None:
            leave(guest)
            if not guest._homes:
                self.there.pop(id(guest), None)

        monkeypatch.setattr(Guest, "sent", sent)
        monkeypatch.setattr(Guest, "leave", left)


@families
def test_statistics_and_perplexity_need_one_block_on_the_device(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = build(family), build(family)
    sites = find_sites(model, SiteSelection())
    wanted = collect(model, tokens(), sites, EVERYTHING, batch_size=4)
    device = Device(limit_bytes=max(map(_bytes, decoder_blocks(other))))
    device.host(other, monkeypatch)
    found = collect(other, tokens(), dict(_linears(other, sites)), EVERYTHING, batch_size=4)
    for name in sites:
        for statistic in STATISTICS:
            one, two = getattr(found[name], statistic), getattr(wanted[name], statistic)
            assert torch.equal(one, two), (name, statistic)
    assert perplexity(other, tokens()) == perplexity(model, tokens())
    assert device.most_bytes == device.limit_bytes and not device.there


def _linears(model: nn.Module, names: object) -> list[tuple[str, nn.Module]]:
    return [(name, model.get_submodule(name)) for name in names]  # type: ignore[attr-defined]


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("method", ["io_svd_plus", "asvd", "dip_svd_search", "dobi_svd"])
def test_a_model_is_compressed_as_on_a_large_device(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device weights are copies, which are lost when a visit ends."""
    model, other = build("llama"), build("llama")
    visit_(other, CPU)
    monkeypatch.setattr(Guest, "sent", lambda _, home: home.clone())
    one, two = (
        compress(each, tokens(), method=method, ratio=0.6, batch_size=4) for each in (model, other)
    )
    assert one.plan == two.plan
    with torch.no_grad():
        logits = [each.model(input_ids=tokens()).logits for each in (one, two)]
    assert torch.equal(*logits)


def test_a_graph_keeps_no_copy_of_a_weight() -> None:
    """The whole graph, through two blocks: weights are sent again when a gradient needs them."""
    model, other = build("llama", torch.float64), build("llama", torch.float64)
    visit_(other.requires_grad_(False), CPU)
    gradients = []
    for each in (model, other):
        hidden = each.get_input_embeddings()(tokens()).detach().requires_grad_()
        each(inputs_embeds=hidden).logits.square().sum().backward()
        gradients.append(hidden.grad)
    assert_close(*gradients, rtol=0, atol=0)


def test_training_a_visitor_is_one_line() -> None:
    model = build("llama")
    visit_(model, CPU)
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match="cannot be trained; set runtime"):
        model(input_ids=tokens())
    with torch.no_grad():  # The failed visit has ended.
        assert torch.isfinite(model(input_ids=tokens()).logits).all()


def test_a_visit_ends_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").requires_grad_(False)
    device = Device(limit_bytes=2**20)
    device.host(model, monkeypatch)
    block = decoder_blocks(model)[1]
    with pytest.raises(NumericalError), present(block):
        assert device.there
        raise NumericalError("of a kind")
    assert not device.there and block.mlp.up_proj.weight.isnan().all()


def test_an_arrival_that_fails_leaves_the_block_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    visit_(model, CPU)
    block = decoder_blocks(model)[0]
    homes = [parameter.data_ptr() for parameter in block.parameters()]
    sent: list[Tensor] = []

    def fails(_: Guest, home: Tensor) -> Tensor:
        sent.append(home.clone())
        if len(sent) == 4:
            raise torch.OutOfMemoryError
        return sent[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Guest, "sent", fails)
        with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
            model(input_ids=tokens())
    assert [parameter.data_ptr() for parameter in block.parameters()] == homes
    assert block.guest._visits == 0


def test_graphs_through_visitors_are_freed_without_a_backward_pass() -> None:
    model = build("llama")
    visit_(model.requires_grad_(False), CPU)
    graphs = []

    def see(*call: Any) -> None:
        graphs.append(node_of(call[-1]))

    decoder_blocks(model)[0].mlp.act_fn.register_forward_hook(see)
    hidden = torch.ones(1, 4, 16, requires_grad=True)
    model(inputs_embeds=hidden)
    assert graphs[0]() is None


def test_what_is_outside_of_blocks_moves_and_buffers_of_blocks_stay() -> None:
    """To the meta device, whose tensors are told from those of main memory."""
    model = build("llama")
    blocks = decoder_blocks(model)
    for number, block in enumerate(blocks):
        block.register_buffer("scale", torch.full((1,), float(number)))
    visit_(model, torch.device("meta"))
    inside = [t for block in blocks for t in [*block.parameters(), *block.buffers()]]
    assert {t.device.type for t in inside} == {"cpu"}
    outside = [model.lm_head.weight, model.model.embed_tokens.weight, model.model.norm.weight]
    assert {t.device.type for t in outside} == {"meta"}
    assert [float(block.scale) for block in blocks] == [0.0, 1.0]
    assert device_of(blocks[0]) == torch.device("meta")


def test_the_limit_of_visits_is_that_of_one_device(
    source: Path,  # noqa: F811
) -> None:
    from iosvd.runs.config import compose_run
    from iosvd.runs.steps import loaded, memory_use

    windows = torch.zeros(8, 16, dtype=torch.long)
    limits = []
    for option in ("false", "true"):
        asked = [f"runtime.blocks_on_cpu={option}", "runtime.memory_gib=4"]
        run = compose_run(overrides(source, *asked))
        limits.append(memory_use(run, loaded(run), Windows(windows)).limit_bytes)
    assert limits[0] == pytest.approx(limits[1], abs=2**26)


def test_corrections_that_need_all_blocks_are_refused(source: Path) -> None:  # noqa: F811
    model = build("llama")
    visit_(model, CPU)
    with pytest.raises(ConfigError, match="this correction needs all decoder blocks"):
        compress(model, tokens(), method="io_svd_anchored", ratio=0.6)
    with pytest.raises(ConfigError, match="set one of them"):
        plan.plan(overrides(source, "runtime.blocks_on_cpu=true", "runtime.device_map=auto"))


def test_a_plan_counts_one_block(source: Path) -> None:  # noqa: F811
    from iosvd.runs.config import compose_run
    from iosvd.runs.steps import loaded, plan_statistics

    here = compose_run(overrides(source))
    there = compose_run(overrides(source, "runtime.blocks_on_cpu=true"))
    model = loaded(there)
    assert device_of(decoder_blocks(model)[0]) == CPU
    sizes = [_bytes(block) for block in decoder_blocks(model)]
    assert visitor_bytes(model) == max(sizes) and visitor_bytes(loaded(here)) == 0
    rest = sum(p.nbytes for p in model.parameters()) - sum(sizes)
    planned = plan_statistics(there, CPU)
    assert planned.outline.block_bytes == tuple(sizes)
    assert planned.outline.visiting_bytes == rest + max(sizes)
    assert planned.peak < plan_statistics(here, CPU).peak
