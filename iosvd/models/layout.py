"""How the sites of a decoder block hang together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iosvd.models.calls import Call


@dataclass(frozen=True)
class Layout:
    """Which sites of a block share inputs, and which write to the residual stream."""

    groups: tuple[tuple[str, ...], ...]  # In order of use; the sites of a group read one tensor.
    writers: tuple[str, ...]  # Sites whose output is added to the residual stream unchanged.


def layout_of(block: nn.Module, hidden: Tensor, call: Call, sites: Sequence[str]) -> Layout:
    """Run a block to find which sites share an input and which write to the residual stream.

    A site writes to the stream if, with all other sites returning zero, the block returns its input
    plus the site's output. Blocks that normalise after the addition have no such site.
    """
    seen: dict[int, list[str]] = {}
    inputs: list[Tensor] = []  # Kept alive, so that ids stay unique.
    with ExitStack() as stack:
        for name in sites:

            def see(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                inputs.append(given[0])
                seen.setdefault(id(given[0]), []).append(name)

            hook = block.get_submodule(name).register_forward_pre_hook(see)
            stack.callback(hook.remove)
        call(block, hidden)
    order = [name for group in seen.values() for name in group]
    writers = tuple(name for name in order if _writes(block, hidden, call, name, order))
    return Layout(tuple(map(tuple, seen.values())), writers)


def _writes(block: nn.Module, hidden: Tensor, call: Call, name: str, sites: Sequence[str]) -> bool:
    generator = torch.Generator().manual_seed(0)
    loud = torch.randn(hidden.shape, generator=generator).to(hidden)

    def answer(site: str, output: Tensor) -> Tensor:
        return loud.reshape(output.shape) if site == name else torch.zeros_like(output)

    if block.get_submodule(name).out_features != hidden.shape[-1]:
        return False
    with ExitStack() as stack:
        for site in sites:
            hook = block.get_submodule(site).register_forward_hook(
                lambda *call, site=site: answer(site, call[-1])
            )
            stack.callback(hook.remove)
        found = call(block, hidden)
    return torch.allclose(found, hidden + loud, rtol=1e-2, atol=1e-2)
