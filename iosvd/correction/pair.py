"""A dense decoder block beside its compressed twin, and the hidden states in front of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iosvd.models.blocks import HiddenStates
from iosvd.models.calls import Call, capture_input
from iosvd.models.layout import Layout
from iosvd.models.visiting import device_of


@dataclass(frozen=True)
class BlockPair:
    """One block while it is corrected; corrections change the twin."""

    number: int  # In the model.
    dense: nn.Module
    twin: nn.Module
    layout: Layout  # Of the sites that the closed form refits.
    reached: Mapping[str, HiddenStates]  # In the dense block: its input (""), and each group's.
    states: HiddenStates  # In front of the twin.
    target: HiddenStates  # Behind the dense block.
    calls: Mapping[int, Call]
    curvature: Tensor | None = None  # KL curvature behind the block, (d, d), if errors weigh by it.

    def site_inputs(
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
