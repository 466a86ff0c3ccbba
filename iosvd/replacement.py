"""Swap layers of a model by qualified name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from iosvd.modules import LowRankLinear
from iosvd.types import Factors


def replace_(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Put low-rank layers in place of the named dense ones."""
    for name, value in factors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, LowRankLinear.from_factors(layer, value))


def densify_(model: nn.Module) -> None:
    """Put dense layers in place of all low-rank ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowRankLinear):
            model.set_submodule(name, layer.dense())


def stored_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Return the bytes that the weights of the named layers take, biases not counted."""
    layers = [model.get_submodule(name) for name in names]
    tensors = [t for x in layers for n, t in x.state_dict().items() if n != "bias"]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank layers of a model by qualified name."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
