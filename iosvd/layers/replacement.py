"""Install compressed layers in a model, and truncate weights for a while."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from iosvd.errors import ModelError, NumericalError, one_line
from iosvd.layers.modules import CompressedLinear, LowRankLinear
from iosvd.models.forward import replaced_forward
from iosvd.types import Site, Spectrum, Stored

Module = TypeVar("Module", bound=nn.Module)


def install_(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Put compressed sites in place of the dense layers of a model, one at a time.

    Sites without factors stay dense and take the site's weight. Dense weights of factorised sites
    are freed, unless something else holds them.
    """
    for name, site in sites.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        new = compressed_layer(layer, site)
        if new is not layer:
            model.set_submodule(name, new)
            layer.to("meta")  # Frees the weight even if a reference to the layer is left.


def compressed_layer(layer: nn.Linear, site: Site) -> nn.Linear | LowRankLinear:
    """Return the layer that computes a compressed site, in the dtype of the dense layer.

    The dense layer itself is returned if nothing about it changes; otherwise it is left as it is.
    """
    if site.factors is None and site.bias is None and site.weight is layer.weight:
        return layer
    new: nn.Linear | LowRankLinear
    if site.factors is None:
        new = _linear(layer, site.weight)
    else:
        new = LowRankLinear.from_factors(layer, site.factors)
    if site.bias is not None:
        if site.factors is None and layer.bias is None:
            raise ModelError(f"{site.name} stays dense, so a correction cannot give it a bias")
        trained = layer.weight.requires_grad
        new.bias = nn.Parameter(site.bias.to(new.weight), requires_grad=trained)
        if isinstance(new, LowRankLinear):
            new.added_bias = layer.bias is None
    return new


def _linear(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return a dense layer with another weight, and a copy of this layer's bias."""
    new = copy.deepcopy(layer, {id(layer.weight): layer.weight})
    trained = layer.weight.requires_grad
    new.weight = nn.Parameter(weight.detach().to(layer.weight), requires_grad=trained)
    return new


def twin_of(module: Module) -> Module:
    """Return a copy of a module that shares all its parameters and buffers.

    Layers installed in the twin leave the original as it is.

    Raises:
        ModelError: a hook or attribute of the module cannot be copied.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    try:
        return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    except (TypeError, RuntimeError) as error:
        raise ModelError(
            f"the model cannot be copied: {one_line(error)}; remove its hooks"
        ) from error


def install_quantized_(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Put quantised layers in place of the named ones, dense or of low rank."""
    for name, site in stored.items():
        model.set_submodule(name, site.module(model.get_submodule(name)))


def set_parameters_(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put new parameters with these values in place of the named ones, which stay as they are."""
    for name, value in values.items():
        owner, _, last = name.rpartition(".")
        before = module.get_parameter(name)
        mine = nn.Parameter(value.detach().to(before), requires_grad=before.requires_grad)
        module.get_submodule(owner).register_parameter(last, mine)


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
    """Return the bytes of the named layers' weights and of the biases that were added."""
    layers = [model.get_submodule(name) for name in names]
    tensors = [
        tensor
        for layer in layers
        for name, tensor in layer.state_dict().items()
        if name != "bias" or getattr(layer, "added_bias", False)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return the compressed layers of a model by qualified name."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, CompressedLinear)}


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank layers of a model by qualified name."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, LowRankLinear)}


@contextmanager
def truncated_weights(
    sites: Mapping[str, nn.Linear], spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]
) -> Iterator[None]:
    """Truncate the weights of these sites to W_k, and restore them at the end."""
    with replaced_weights(sites, truncated_products(sites, spectra, ranks).items()):
        yield


def truncated_products(
    sites: Mapping[str, nn.Linear], spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return W_k of these sites, on the device and in the dtype of their weights."""
    found = {}
    for site, rank in ranks.items():
        spectrum, weight = spectra[site], sites[site].weight
        left, right = spectrum.left[:, :rank], spectrum.right[:rank]
        found[site] = (left.to(weight.device) @ right.to(weight.device)).to(weight.dtype)
    return found


@contextmanager
def replaced_weights(
    sites: Mapping[str, nn.Linear], weights: Iterable[tuple[str, Tensor]]
) -> Iterator[None]:
    """Let sites have other weights, by name, and restore their own at the end.

    Only pointers are swapped; the dense weights are not copied.
    """
    dense: dict[str, Tensor] = {}
    try:
        for site, weight in weights:
            dense[site] = sites[site].weight.data
            sites[site].weight.data = weight.to(dense[site])
        yield
    finally:
        for site, weight in dense.items():
            sites[site].weight.data = weight


@contextmanager
def gated(
    sites: Mapping[str, nn.Linear], spectra: Mapping[str, Spectrum], gates: Mapping[str, Tensor]
) -> Iterator[None]:
    """Make these sites compute left (gate ⊙ (right x)), with the first components of spectra."""

    def forward(name: str, x: Tensor) -> Tensor:
        return _components(x, spectra[name], gates[name], sites[name].bias)

    with _replaced_forwards(sites, gates, forward):
        yield


@contextmanager
def perturbed(
    sites: Mapping[str, nn.Linear], spectra: Mapping[str, Spectrum], changes: Mapping[str, Tensor]
) -> Iterator[None]:
    """Make these sites compute W x + left (change ⊙ (right x)), with the first components."""
    plain = {name: sites[name].forward for name in changes}

    def forward(name: str, x: Tensor) -> Tensor:
        found: Tensor = plain[name](x)
        return found + _components(x, spectra[name], changes[name], None)

    with _replaced_forwards(sites, changes, forward):
        yield


@contextmanager
def _replaced_forwards(
    sites: Mapping[str, nn.Linear],
    names: Iterable[str],
    forward: Callable[[str, Tensor], Tensor],
) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced_forward(sites[name], partial(forward, name)))
        yield


def _components(x: Tensor, spectrum: Spectrum, factors: Tensor, bias: Tensor | None) -> Tensor:
    place = (x.device, x.dtype)
    left = spectrum.left[:, : len(factors)].to(*place)
    right = spectrum.right[: len(factors)].to(*place)
    return linear(linear(x, right) * factors.to(*place), left, bias)
