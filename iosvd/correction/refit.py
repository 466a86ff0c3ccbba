"""Refit all sites in forward order, each given its input behind the sites refitted before.

Block by block: the dense block runs once on the dense hidden states, and the inputs of its sites
are kept. Its twin, with the truncated layers, runs up to each group of sites that share an input;
the group is refitted and installed in the twin. So the dense model is passed once and the
compressed one about three times, mostly in part; no site costs a pass of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iosvd.correction.base import CorrectionInputs
from iosvd.correction.drift import Drift, DriftSums
from iosvd.correction.refit_options import RefitOptions
from iosvd.correction.site_refit import refitted
from iosvd.layers.replacement import compressed_layer, install_, twin_of
from iosvd.models.blocks import (
    Call,
    HiddenStates,
    calls_of,
    capture_input,
    hidden_states_of,
)
from iosvd.models.layout import Layout, layout_of
from iosvd.models.linear_form import expert_of
from iosvd.models.sites import decoder_blocks
from iosvd.models.visiting import device_of
from iosvd.system.progress import track
from iosvd.types import Site


@torch.no_grad()
def refit(inputs: CorrectionInputs, options: RefitOptions) -> dict[str, Site]:
    """Return all sites refitted, but for experts; the dense model is left as it is."""
    model, calibration = inputs.calibration.model, inputs.calibration
    blocks = decoder_blocks(model)
    names_by_block = [_sites_in(model, block, inputs) for block in blocks]
    inside = {name for names in names_by_block for name in names.values()}
    calls = calls_of(model, calibration.tokens, calibration.batch_size)
    dense_states = hidden_states_of(model, calibration.tokens, calibration.batch_size)
    done = {name: site for name, site in inputs.sites.items() if name not in inside}
    prefix = twin_of(model) if done else model
    install_(prefix, done)
    states = hidden_states_of(prefix, calibration.tokens, calibration.batch_size)
    work = zip(blocks, names_by_block, calls, strict=True)
    for block, names, block_calls in track(work, len(blocks), "refit", "block"):
        # The compressed model routes tokens otherwise, so an expert's inputs have no partners.
        fitted = [name for name, full in names.items() if expert_of(model, full) is None]
        layout = _layout(block, dense_states, block_calls, fitted)
        groups = [group[0] for group in layout.groups]
        reached = dense_states.pass_(block, block_calls, ["", *groups])
        sites = {name: inputs.sites[full] for name, full in names.items()}
        twin = twin_of(block)
        install_(twin, sites)
        pair = _Pair(block, twin, layout, reached, states, block_calls)
        for group in layout.groups:
            if not options.dense_sites and all(sites[name].factors is None for name in group):
                continue
            drifts = pair.drifts(group, options)
            for name in group:
                layer = block.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                sites[name] = refitted(inputs, options, sites[name], layer, *drifts)
                twin.set_submodule(name, compressed_layer(layer, sites[name]))
        done |= {site.name: site for site in sites.values()}
        states.pass_(twin, block_calls)
        del twin, reached, pair  # Free them before the next block's are made.
    return {name: done[name] for name in inputs.sites}


def _sites_in(model: nn.Module, block: nn.Module, inputs: CorrectionInputs) -> dict[str, str]:
    """Return the sites of a block: their names within it, and within the model."""
    start = next(name for name, module in model.named_modules() if module is block) + "."
    return {name.removeprefix(start): name for name in inputs.sites if name.startswith(start)}


def _layout(
    block: nn.Module, states: HiddenStates, calls: Mapping[int, Call], names: Sequence[str]
) -> Layout:
    _, hidden = next(states.batches(device_of(block)))
    return layout_of(block, hidden, calls[len(hidden)], names)


@dataclass(frozen=True)
class _Pair:
    """A dense block, its compressed twin, and the hidden states in front of both."""

    dense: nn.Module
    twin: nn.Module
    layout: Layout
    reached: Mapping[str, HiddenStates]  # In the dense block: its input (""), and each group's.
    states: HiddenStates  # In front of the twin.
    calls: Mapping[int, Call]

    def drifts(self, group: Sequence[str], options: RefitOptions) -> tuple[Drift, Drift | None]:
        """Return the drift of a group's input on most windows, and on the held-out ones."""
        first_held = max(1, round((1 - options.held_out) * len(self.states.states)))
        fitted, held = DriftSums(), DriftSums()
        for where, x_d, x_c, lacking in self._inputs(group, options.stream):
            cut = min(max(first_held - where.start, 0), len(x_d))
            for sums, part in ((fitted, slice(cut)), (held, slice(cut, None))):
                if len(x_d[part]):
                    sums.add(x_d[part], x_c[part], None if lacking is None else lacking[part])
        return fitted.means(), held.means() if held.tokens else None

    def _inputs(
        self, group: Sequence[str], stream: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Yield a group's inputs x_d and x_c batch by batch, and what the residual stream lacks."""
        name, writers = group[0], self.layout.writers
        writes = stream and len(group) == 1 and name in writers
        before = writers[: writers.index(name)] if writes else ()
        device = device_of(self.twin)
        for where, h_c in self.states.batches(device):
            x_c, s_c = capture_input(self.twin, h_c, self.calls[len(h_c)], name, before)
            x_d = self.reached[name].states[where].to(device)
            s_d = self._dense_stream(where, before, device) if writes else None
            yield where, x_d, x_c.reshape(x_d.shape), None if s_d is None else s_d - s_c

    def _dense_stream(self, where: slice, writers: Sequence[str], device: torch.device) -> Tensor:
        """Return the residual stream of the dense block after these sites have written to it."""
        stream = self.reached[""].states[where].to(device)
        for name in writers:
            group = next(group for group in self.layout.groups if name in group)
            x_d = self.reached[group[0]].states[where].to(device)
            stream = stream + self.dense.get_submodule(name)(x_d)
        return stream
