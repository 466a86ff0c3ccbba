"""Several layers with one input: their down products as one (METHODS 8).

At batch 1 a product takes as long as reading its matrix, and small ones longer: each call has a
cost of its own. The right factors of q, k and v, and of gate and up, are stacked in one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from iosvd.errors import ModelError
from iosvd.layers.modules import CompressedLinear, LowRankLinear

if TYPE_CHECKING:
    from typing_extensions import Self


def down_product(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the latent (…, k) of a layer of two factors, the output (…, out) of any other."""
    result: Tensor = layer.down(x) if isinstance(layer, LowRankLinear) else layer(x)
    return result


def up_product(layer: nn.Linear, first: Tensor) -> Tensor:
    """Return the layer's output (…, out) from the result of `down_product`."""
    return layer.up(first) if isinstance(layer, LowRankLinear) else first


def can_be_packed(layer: nn.Linear) -> bool:
    """Whether the first product of a layer is one with a matrix in the model's dtype."""
    if isinstance(layer, LowRankLinear):
        return "weight" not in layer.layouts
    return type(layer) is nn.Linear


class Packed:
    """The down products of layers with the same input, as one product where they allow it.

    The weights of these layers become views of the packed matrix: nothing is stored twice, and the
    layers and their checkpoint stay what they are. For inference only.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, join: bool) -> None:
        self._layers = list(layers)
        joined = [layer for layer in self._layers if join and can_be_packed(layer)]
        joined = joined if len(joined) > 1 else []
        self._joins = [layer in joined for layer in self._layers]
        self._sizes = [len(layer.weight) for layer in joined]
        if not joined:
            return
        with torch.no_grad():
            self._weight = torch.cat([layer.weight.detach() for layer in joined])
        for layer, view in zip(joined, self._weight.split(self._sizes), strict=True):
            layer.weight.data = view

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return the result of `down_product` for every layer.

        Raises:
            ModelError: a gradient is asked for, which the packed matrix does not pass on.
        """
        if torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in self._layers):
            raise ModelError(
                "a model that was prepared for generation cannot be trained; load it again"
            )
        parts = iter(linear(x, self._weight).split(self._sizes, dim=-1) if self._sizes else ())
        return [
            _with_bias(layer, next(parts)) if joins else down_product(layer, x)
            for layer, joins in zip(self._layers, self._joins, strict=True)
        ]


def unpack_(module: nn.Module) -> None:
    """Give every linear layer in a module a weight of its own again."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.clone()


def _with_bias(layer: nn.Linear, product: Tensor) -> Tensor:
    """Add the bias of a dense layer; one of two factors adds it with its left one."""
    dense = not isinstance(layer, CompressedLinear)
    return product + layer.bias if dense and layer.bias is not None else product


def _repack(module: PackedModule, _: object) -> None:
    module.pack_()


class PackedModule(nn.Module):
    """Keeps its layers' weights packed when they are moved, cast, copied or loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_repack)

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
        self._packed_down = Packed([self.gate_proj, self.up_proj], join=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self._packed_down(x)
        gate = up_product(self.gate_proj, gate)
        up = up_product(self.up_proj, up)
        result: Tensor = self.down_proj(self.act_fn(gate) * up)  # type: ignore[operator]
        return result
