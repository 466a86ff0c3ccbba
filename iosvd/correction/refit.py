"""Refit all sites in forward order, each to what reaches it behind the sites refitted before.

Per block: a copy of the dense block is kept, truncated layers are put in place, and then, group by
group of sites that share an input, both blocks are run up to the group on the hidden states carried
so far. A group costs the forward pass of a part of a block, twice; none costs a pass of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iosvd.blocks import Call, Carried, arrive, calls_of, carried_of, device_of, layout_of
from iosvd.correction.base import Given
from iosvd.correction.drift import Drift, DriftSums
from iosvd.correction.rule import Rule, refitted
from iosvd.modules import LowRankLinear
from iosvd.progress import track
from iosvd.quantization.base import Site
from iosvd.replacement import replace_
from iosvd.sites import decoder_blocks


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
        pair = _Pair(copy.deepcopy(block), block, dense, states, of_block)
        sites = {name: given.sites[full] for name, full in names.items()}
        replace_(model, {site.name: site for site in sites.values()})
        for group in pair.groups(list(sites), rule):
            drifts = pair.drifts(group, rule.held_out)
            for name in group.names:
                dense_layer = pair.dense.get_submodule(name)
                assert isinstance(dense_layer, nn.Linear)
                sites[name] = refitted(given, rule, sites[name], dense_layer, *drifts)
        found |= {site.name: site for site in sites.values()}
        dense.pass_(pair.dense, of_block)
        states.pass_(block, of_block)
    return {name: found[name] for name in given.sites}


def _sites_in(model: nn.Module, block: nn.Module, given: Given) -> dict[str, str]:
    """Return the sites of a block: their names in it, and in the model."""
    start = next(name for name, module in model.named_modules() if module is block) + "."
    return {name.removeprefix(start): name for name in given.sites if name.startswith(start)}


@dataclass(frozen=True)
class _Group:
    """Sites that read one tensor."""

    names: tuple[str, ...]
    writers: tuple[str, ...]  # Sites that write to the residual stream before them.
    to_stream: bool  # Whether it is one site, whose output joins the stream.


@dataclass(frozen=True)
class _Pair:
    """A block, dense and compressed, and the hidden states in front of both."""

    dense: nn.Module
    block: nn.Module
    dense_states: Carried
    states: Carried
    calls: Mapping[int, Call]

    def groups(self, names: Sequence[str], rule: Rule) -> list[_Group]:
        """Return the groups that are to be refitted, in the order of their use."""
        _, hidden = next(self.dense_states.batches(device_of(self.dense)))
        layout = layout_of(self.dense, hidden, self.calls[len(hidden)], names)
        found, before = [], list[str]()
        for group in layout.groups:
            low_rank = [isinstance(self.block.get_submodule(n), LowRankLinear) for n in group]
            to_stream = rule.stream and len(group) == 1 and group[0] in layout.writers
            if rule.dense_sites or any(low_rank):
                found.append(_Group(group, tuple(before), to_stream))
            before += [name for name in group if name in layout.writers]
        return found

    def drifts(self, group: _Group, held_out: float) -> tuple[Drift, Drift | None]:
        """Return the drift of a group's input on most windows, and on those that are held out."""
        first_held = round((1 - held_out) * len(self.states.states))
        fitted, held = DriftSums(), DriftSums()
        for where, x_d, x_c, lacking in self._inputs(group):
            sums = fitted if where.start < first_held or where.start == 0 else held
            sums.add(x_d, x_c, lacking)
        return fitted.means(), held.means() if held.tokens else None

    def _inputs(self, group: _Group) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Yield a group's inputs x_d and x_c batch by batch, and what the stream lacks."""
        device = device_of(self.block)
        pairs = zip(self.dense_states.batches(device), self.states.batches(device), strict=True)
        for (where, h_d), (_, h_c) in pairs:
            call = self.calls[len(h_d)]
            x_d, s_d = arrive(self.dense, h_d, call, group.names[0], group.writers)
            x_c, s_c = arrive(self.block, h_c, call, group.names[0], group.writers)
            yield where, x_d, x_c, s_d - s_c if group.to_stream else None
