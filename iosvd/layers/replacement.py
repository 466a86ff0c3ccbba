"""Swap layers of a model by qualified name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from iosvd.errors import NumericalError
from iosvd.layers.modules import CompressedLinear, LowRankLinear
from iosvd.types import Site, Spectrum, Stored


def replace_(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Put low-rank layers in the model's dtype in place of those that have factors, one by one."""
    for name, site in sites.items():
        if site.factors is not None:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, LowRankLinear.from_factors(layer, site.factors))
            layer.to("meta")  # Frees the weight, even where a reference to the layer is left.


def store_(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Put quantised layers in place of the named ones, dense or of low rank."""
    for name, site in stored.items():
        model.set_submodule(name, site.module(model.get_submodule(name)))


def check_finite(model: nn.Module) -> None:
    """Raise NumericalError for the first compressed layer with NaN or infinity in it."""
    for name, layer in compressed_layers(model).items():
        for part, tensor in layer.state_dict().items():
            if not torch.isfinite(tensor).all():
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise NumericalError(
                    f"{part} of {name} has NaN or infinity in {dtype}; try model.dtype=bfloat16 or"
                    " float32, raise the damping, or exclude the site (model.sites.exclude)"
                )


def densify_(model: nn.Module, dtype: torch.dtype) -> None:
    """Put dense layers in place of all compressed ones."""
    for name, layer in compressed_layers(model).items():
        model.set_submodule(name, layer.dense(dtype))


def stored_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Return the bytes that the weights of the named layers take, and biases that were added."""
    layers = [model.get_submodule(name) for name in names]
    tensors = [
        tensor
        for layer in layers
        for name, tensor in layer.state_dict().items()
        if name != "bias" or getattr(layer, "added_bias", False)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return the layers of a model that took a dense one's place, by qualified name."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, CompressedLinear)}


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank layers of a model by qualified name."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, LowRankLinear)}


@contextmanager
def truncated_weights(
    sites: Mapping[str, nn.Linear], spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]
) -> Iterator[None]:
    """Give these sites the weights W_k of their ranks, and their own back at the end.

    Only pointers move: the dense weights stay where they are.
    """
    dense = {site: sites[site].weight.data for site in ranks}
    try:
        for site, rank in ranks.items():
            spectrum, device = spectra[site], dense[site].device
            left, right = spectrum.left[:, :rank].to(device), spectrum.right[:rank].to(device)
            sites[site].weight.data = (left @ right).to(dense[site].dtype)
        yield
    finally:
        for site, weight in dense.items():
            sites[site].weight.data = weight


@contextmanager
def gated(
    sites: Mapping[str, nn.Linear], spectra: Mapping[str, Spectrum], gates: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let these sites compute left (gate ⊙ (right x)), with the first components of spectra."""

    def forward(site: nn.Linear, name: str, x: Tensor) -> Tensor:
        place = (x.device, x.dtype)
        spectrum, count = spectra[name], len(gates[name])
        left, right = spectrum.left[:, :count].to(*place), spectrum.right[:count].to(*place)
        return linear(linear(x, right) * gates[name].to(*place), left, site.bias)

    before = {name: vars(sites[name]).get("forward") for name in gates}
    try:
        for name in gates:
            sites[name].forward = partial(forward, sites[name], name)  # type: ignore[method-assign]
        yield
    finally:
        for name in gates:
            vars(sites[name]).pop("forward", None)
            if (own := before[name]) is not None:  # A hook of those who placed the layer.
                sites[name].forward = own  # type: ignore[method-assign]
