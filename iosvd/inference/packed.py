"""Several layers with one input: their first products as one (METHODS 8).

Two small products per layer, one after the other, are slower at batch 1 than one dense product:
a call costs as much as the bytes that it reads. The right factors of q, k and v, and of gate and
up, lie under each other in one matrix instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from iosvd.layers.modules import CompressedLinear, LowRankLinear

if TYPE_CHECKING:
    from typing_extensions import Self


def first_product(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the latent (…, k) of a layer of two factors, the output (…, out) of any other."""
    result: Tensor = layer.down(x) if isinstance(layer, LowRankLinear) else layer(x)
    return result


def second_product(layer: nn.Linear, first: Tensor) -> Tensor:
    """Return the layer's output (…, out) from the result of `first_product`."""
    return layer.up(first) if isinstance(layer, LowRankLinear) else first


def can_be_packed(layer: nn.Linear) -> bool:
    """Whether the first product of a layer is one with a matrix in the model's dtype."""
    if isinstance(layer, LowRankLinear):
        return "weight" not in layer.layouts
    return type(layer) is nn.Linear


class Packed:
    """The first products of layers with the same input, as one product where they allow it.

    The weights of these layers become views of the packed matrix: nothing is kept twice, and the
    layers and their checkpoint stay what they are. Without a gradient.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, join: bool) -> None:
        self._layers = list(layers)
        self._joined = [layer for layer in self._layers if join and can_be_packed(layer)]
        if len(self._joined) < 2:
            self._joined = []
            return
        with torch.no_grad():
            self._weight = torch.cat([layer.weight.detach() for layer in self._joined])
        self._sizes = [len(layer.weight) for layer in self._joined]
        for layer, view in zip(self._joined, self._weight.split(self._sizes), strict=True):
            layer.weight.data = view

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return what `first_product` returns for every layer."""
        if not self._joined:
            return [first_product(layer, x) for layer in self._layers]
        parts = iter(linear(x, self._weight).split(self._sizes, dim=-1))
        return [self._one(layer, x, parts) for layer in self._layers]

    def _one(self, layer: nn.Linear, x: Tensor, parts: Any) -> Tensor:
        if layer not in self._joined:
            return first_product(layer, x)
        part: Tensor = next(parts)
        has_bias = not isinstance(layer, CompressedLinear) and layer.bias is not None
        return part + layer.bias if has_bias else part


class PackedModule(nn.Module):
    """Keeps its layers' weights packed when they are moved, cast, copied or loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(lambda module, _: module.pack_())

    def pack_(self) -> None:
        """Pack the weights anew."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.pack_()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack_()


class PackedMLP(PackedModule):
    """down(act(gate x) ⊙ up x), with one product for the right factors of gate and up."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.act_fn = mlp.act_fn
        self.pack_()

    def pack_(self) -> None:
        self._first = Packed([self.gate_proj, self.up_proj], join=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self._first(x)
        gate = second_product(self.gate_proj, gate)
        up = second_product(self.up_proj, up)
        result: Tensor = self.down_proj(self.act_fn(gate) * up)  # type: ignore[operator]
        return result
