"""Decoder blocks that live in main memory and visit a device while they compute.

So a model larger than the device can be calibrated and evaluated on it: the device holds the
embeddings, the head, one block, and the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iosvd.errors import ConfigError
from iosvd.models.sites import decoder_blocks


def visit_(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, but for its decoder blocks, which will visit it.

    The blocks are frozen: training would change the copy on the device.
    """
    device = torch.empty(0, device=device).device  # With an index: "cuda" is not equal to "cuda:0".
    blocks = list(dict.fromkeys(decoder_blocks(model)))
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    for block in blocks:
        block.requires_grad_(False)
        if device.type == "cuda":
            for tensor in _tensors(block):
                tensor.data = tensor.data.pin_memory()
        block.guest = Guest(block, device)  # type: ignore[assignment]


def visits(model: nn.Module) -> bool:
    """Whether the decoder blocks live in main memory."""
    return any(hasattr(block, "guest") for block in decoder_blocks(model))


def visitor_bytes(model: nn.Module) -> int:
    """Return the bytes of the largest decoder block, if blocks visit a device; else 0."""
    if not visits(model):
        return 0
    return max(sum(t.nbytes for t in _tensors(block)) for block in decoder_blocks(model))


def device_of(module: nn.Module) -> torch.device:
    """Return the device where a module computes."""
    guest = getattr(module, "guest", None)
    return guest.device if guest else next(module.parameters()).device


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Keep a module on the device where it computes."""
    guest = getattr(module, "guest", None)
    if guest is None:
        yield
        return
    try:
        guest.arrive()
        yield
    finally:
        guest.leave()


class _Away(NamedTuple):
    """A tensor of a graph that is, or is a view of, a weight of a guest."""

    weight: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Guest:
    """A module whose tensors are on a device during its forward pass, and elsewhere otherwise."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self._module = module
        self._visits = 0  # That are nested.
        self._homes: dict[Tensor, Tensor] = {}  # Of its tensors, during a visit.
        self._graphs: list[Any] = []
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def arrive(self) -> None:
        """Copy the tensors to the device, unless they are there."""
        self._visits += 1
        if self._visits > 1:
            return
        for tensor in _tensors(self._module):
            self._homes[tensor] = tensor.data
            tensor.data = self.sent(tensor.data)

    def leave(self) -> None:
        """End a visit; the last one frees the copies."""
        self._visits -= 1
        if self._visits == 0:
            for tensor, home in self._homes.items():
                tensor.data = home
            self._homes.clear()

    def sent(self, home: Tensor) -> Tensor:
        """Return a copy on the device."""
        return home.to(self.device, non_blocking=True)

    def _before(self, *_: Any) -> None:
        self.arrive()
        if torch.is_grad_enabled():
            if any(p.requires_grad for p in self._module.parameters()):
                raise ConfigError(
                    "layers that live in main memory cannot be trained; set"
                    " runtime.blocks_on_cpu=false"
                )
            self._graphs.append(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            self._graphs[-1].__enter__()

    def _after(self, *_: Any) -> None:
        if torch.is_grad_enabled() and self._graphs:
            self._graphs.pop().__exit__(None, None, None)
        self.leave()

    def _pack(self, tensor: Tensor) -> Tensor | _Away:
        """Let a graph keep no copy of a weight."""
        place = tensor.untyped_storage().data_ptr()
        for weight in self._homes:
            if weight.untyped_storage().data_ptr() == place:
                offset = int(tensor.storage_offset())
                return _Away(weight, tuple(tensor.shape), tensor.stride(), offset)
        return tensor.detach()  # The tensor itself may hold the graph that holds this one.

    def _unpack(self, packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        data = packed.weight.data
        found = data if packed.weight in self._homes else self.sent(data)
        return found.as_strided(packed.size, packed.stride, packed.offset)


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(dict.fromkeys([*module.parameters(), *module.buffers()]))
