"""Refit all sites in forward order, each to what reaches it behind the sites refitted before.

Per block: a copy of the dense block is run once on the dense hidden states carried so far, and what
reaches each of its sites is kept; truncated layers are put in place; then, group by group of sites
that share an input, the compressed block is run up to the group. So the dense model is passed once
and the compressed one about three times, most of them in part; no site costs a pass of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from iosvd.correction.base import Given
from iosvd.correction.drift import Drift, DriftSums
from iosvd.correction.rule import Rule, refitted
from iosvd.layers.replacement import replace_
from iosvd.models.blocks import (
    Call,
    Carried,
    Layout,
    arrive,
    calls_of,
    carried_of,
    device_of,
    layout_of,
)
from iosvd.models.sites import decoder_blocks
from iosvd.system.progress import track
from iosvd.types import Site


@torch.no_grad()
def refit(given: Given, rule: Rule) -> dict[str, Site]:
    """Put refitted layers in place, block by block, and return the sites as they are now."""
    model, blocks = given.model, decoder_blocks(given.model)
    mine = [_sites_in(model, block, given) for block in blocks]
    inside = {name for names in mine for name in names.values()}
    calls = calls_of(model, given.tokens, given.batch_size)
    dense = carried_of(model, given.tokens, given.batch_size)
    found = {name: site for name, site in given.sites.items() if name not in inside}
    replace_(model, found)
    states = carried_of(model, given.tokens, given.batch_size)
    work = zip(blocks, mine, calls, strict=True)
    for block, names, of_block in track(work, len(blocks), "refit", "block"):
        layout = _layout(block, dense, of_block, list(names))
        kept = copy.deepcopy(block)
        reached = dense.pass_(kept, of_block, ["", *(group[0] for group in layout.groups)])
        sites = {name: given.sites[full] for name, full in names.items()}
        replace_(model, {site.name: site for site in sites.values()})
        sites = {name: _without_weight(site) for name, site in sites.items()}
        pair = _Pair(kept, block, layout, reached, states, of_block)
        for group in layout.groups:
            if not rule.dense_sites and all(sites[name].factors is None for name in group):
                continue
            drifts = pair.drifts(group, rule)
            for name in group:
                dense_layer = kept.get_submodule(name)
                assert isinstance(dense_layer, nn.Linear)
                sites[name] = refitted(given, rule, sites[name], dense_layer, *drifts)
        found |= {site.name: site for site in sites.values()}
        states.pass_(block, of_block)
        del kept, reached, pair  # Not beside those of the next block.
    return {name: found[name] for name in given.sites}


def _sites_in(model: nn.Module, block: nn.Module, given: Given) -> dict[str, str]:
    """Return the sites of a block: their names in it, and in the model."""
    start = next(name for name, module in model.named_modules() if module is block) + "."
    return {name.removeprefix(start): name for name in given.sites if name.startswith(start)}


def _without_weight(site: Site) -> Site:
    """Keep of the dense weight of a factorised site its shape alone: the copied block has it."""
    return site if site.factors is None else replace(site, weight=site.weight.to("meta"))


def _layout(
    block: nn.Module, states: Carried, calls: Mapping[int, Call], names: Sequence[str]
) -> Layout:
    _, hidden = next(states.batches(device_of(block)))
    return layout_of(block, hidden, calls[len(hidden)], names)


@dataclass(frozen=True)
class _Pair:
    """A block, dense and compressed, and what is to be known of both."""

    dense: nn.Module
    block: nn.Module
    layout: Layout
    reached: Mapping[str, Carried]  # In the dense block: its input (""), and each group's.
    states: Carried  # In front of the compressed block.
    calls: Mapping[int, Call]

    def drifts(self, group: Sequence[str], rule: Rule) -> tuple[Drift, Drift | None]:
        """Return the drift of a group's input on most windows, and on those that are held out."""
        first_held = max(1, round((1 - rule.held_out) * len(self.states.states)))
        fitted, held = DriftSums(), DriftSums()
        for where, x_d, x_c, lacking in self._inputs(group, rule.stream):
            cut = min(max(first_held - where.start, 0), len(x_d))
            for sums, part in ((fitted, slice(cut)), (held, slice(cut, None))):
                if len(x_d[part]):
                    sums.add(x_d[part], x_c[part], None if lacking is None else lacking[part])
        return fitted.means(), held.means() if held.tokens else None

    def _inputs(
        self, group: Sequence[str], stream: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Yield a group's inputs x_d and x_c batch by batch, and what the stream lacks."""
        name, writers = group[0], self.layout.writers
        writes = stream and len(group) == 1 and name in writers
        before = writers[: writers.index(name)] if writes else ()
        device = device_of(self.block)
        for where, h_c in self.states.batches(device):
            x_c, s_c = arrive(self.block, h_c, self.calls[len(h_c)], name, before)
            x_d = self.reached[name].states[where].to(device)
            s_d = self._dense_stream(where, before, device) if writes else None
            yield where, x_d, x_c.reshape(x_d.shape), None if s_d is None else s_d - s_c

    def _dense_stream(self, where: slice, writers: Sequence[str], device: torch.device) -> Tensor:
        """Return what the dense block's stream is once these sites have written to it."""
        stream = self.reached[""].states[where].to(device)
        for name in writers:
            group = next(group for group in self.layout.groups if name in group)
            x_d = self.reached[group[0]].states[where].to(device)
            stream = stream + self.dense.get_submodule(name)(x_d)
        return stream
