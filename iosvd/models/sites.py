"""Find the target linear layers ("sites") of a model by module type and glob."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.errors import ConfigError, ModelError, NumericalError
from iosvd.models.attention_form import JOINT, PROJECTIONS, Form, Part, to_form_
from iosvd.models.linear_form import expert_of, to_linear_form_
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


BLOCKS = ("*.layers.*", "*.h.*", "*.blocks.*")  # Names that architectures give their blocks.


@dataclass(frozen=True)
class SiteSelection:
    """Selects target modules by globs of qualified names (`*` also matches dots) and by type.

    The default takes every linear layer inside decoder blocks, whichever of three names the
    architecture gives their list, and leaves embeddings and the language-model head alone.
    """

    include: list[str] = field(default_factory=lambda: list(BLOCKS))
    exclude: list[str] = field(default_factory=list)
    module_types: list[str] = field(default_factory=lambda: ["torch.nn.Linear"])
    form: Form = Form.separate  # Of queries, keys and values.


def find_sites(model: nn.Module, selection: SiteSelection) -> dict[str, nn.Linear]:
    """Return the target layers by qualified name, in model order, and check their weights.

    Layers that are linear under another form are given the usual one first (`linear_form`).

    Raises:
        ConfigError: a module type does not exist or is not a linear layer.
        ModelError: nothing matches, or a weight is used in two places.
        NumericalError: a weight is not finite.
    """
    sites = find_linears(model, selection)
    _check_unshared(model, sites)
    for name, module in sites.items():
        if module.weight.is_meta:
            raise ModelError(
                f"{name} was offloaded to disk or main memory, where it cannot be compressed;"
                " use a device with more memory, or runtime.device=cpu without a device map"
            )
        if not torch.isfinite(module.weight).all():
            raise NumericalError(f"the weight of {name} has NaN or infinity; check the checkpoint")
    return sites


def find_linears(model: nn.Module, selection: SiteSelection) -> dict[str, nn.Linear]:
    """Return the target layers by qualified name, in model order, whatever their weights hold.

    Raises:
        ConfigError: a module type does not exist or is not a linear layer.
        ModelError: nothing matches.
    """
    to_linear_form_(model)
    to_form_(model, decoder_of(model), selection.form)
    # A vision tower may name its blocks as a decoder does.
    place = decoder_of(model) if selection.include == list(BLOCKS) else model
    inside = set(place.modules())
    types = tuple(_module_type(path) for path in selection.module_types)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, types) and module in inside and _is_linear(module)
    }
    sites = {
        name: module
        for name, module in linears.items()
        if _matches(name, selection.include) and not _matches(name, selection.exclude)
    }
    if not sites:
        found = ", ".join(list(linears)[:3]) or "none"
        raise ModelError(
            f"no site matches model.sites.include={selection.include} and"
            f" exclude={selection.exclude}; layers of type {selection.module_types}: {found}, …"
        )
    return sites


def _is_linear(layer: nn.Linear) -> bool:
    """Whether a layer computes W x + b: classes that inherit from nn.Linear need not (routers)."""
    if type(layer).forward is nn.Linear.forward:
        return True
    weight = layer.weight
    if weight.shape != (layer.out_features, layer.in_features):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, layer.in_features, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, weight, layer.bias)
        try:
            found = layer(x)
        except Exception:  # noqa: BLE001 (whatever a model's own code raises)
            return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return weight.is_meta or bool(torch.norm(found - expected) <= 1e-2 * torch.norm(expected))


def _check_unshared(model: nn.Module, sites: Mapping[str, nn.Linear]) -> None:
    """Raise ModelError for the first site whose weight another module uses too."""
    places: dict[int, dict[tuple[int, str], str]] = {}  # By weight: holder and its name in there.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        parent, _, child = path.rpartition(".")
        # A block that stands in two places of the model holds its layers once.
        place = (id(model.get_submodule(parent)), child)
        places.setdefault(id(parameter), {}).setdefault(place, path)
    for name, site in sites.items():
        others = [path for path in places[id(site.weight)].values() if path != name]
        if others:
            raise ModelError(
                f"{name} shares its weight with {others[0]}, so it cannot be compressed alone;"
                " exclude it (model.sites.exclude)"
            )


def covered_share(model: nn.Module, sites: Mapping[str, nn.Linear]) -> float:
    """Return the share of the decoder blocks' weights that sites hold, which a ratio refers to.

    Weights are parameters of two or more dimensions; norms, biases and gates do not count.
    """
    mine = {id(site.weight): site.weight.numel() for site in sites.values()}
    parameters = (p for block in decoder_blocks(model) for p in block.parameters())
    inside = {id(p): p.numel() for p in parameters if p.dim() > 1}
    return sum(mine.values()) / sum((inside | mine).values())


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks: of the lists of modules in the decoder, that with most weights.

    Blocks may be of several classes.
    """
    lists = [module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=_weights_in, default=()))


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the language model of a vision-language model, else the body of a model or itself."""
    found = getattr(model, "get_decoder", lambda: model)()
    return found if isinstance(found, nn.Module) else model


def reading_tokens(model: nn.Module) -> set[nn.Module]:
    """Return the modules that read one row per token; others read an image's patches."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {*decoder_of(model).modules(), *([] if head is None else [head])}


def cached_widths(model: nn.Module, sites: Iterable[str]) -> dict[str, int]:
    """Return the entries of a cache of keys and values that each site makes for each token.

    The attention of a vision tower caches nothing.
    """
    reading = set(decoder_of(model).modules())
    return {
        site: _cached_width(model, site) if model.get_submodule(site) in reading else 0
        for site in sites
    }


def _cached_width(model: nn.Module, site: str) -> int:
    parent, _, last = site.rpartition(".")
    if last == JOINT:  # Ours; Phi-3 has one of its own, of which we do not know what is cached.
        parts = [getattr(model.get_submodule(parent), name, None) for name in PROJECTIONS[1:]]
        return sum(part.out_features for part in parts if isinstance(part, Part))
    if set(site.split(".")[-2:]) & set(PROJECTIONS[1:]):
        return model.get_submodule(site).out_features  # type: ignore[return-value]
    return 0


def _weights_in(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder blocks by the start of their modules' names, such as model.layers.3."""
    names = {module: name for name, module in model.named_modules()}
    return {f"{names[block]}.": block for block in decoder_blocks(model)}


def names_within(start: str, names: Iterable[str]) -> dict[str, str]:
    """Return those names that begin so, by what follows."""
    return {name.removeprefix(start): name for name in names if name.startswith(start)}


def layer_and_role(site: str) -> tuple[int, str]:
    """Split a site's name at its first number: model.layers.3.mlp.up_proj is (3, mlp.up_proj).

    The numbers of experts are left out: all experts of a layer have the same role.
    """
    parts = site.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None:
        return 0, site
    return int(parts[place]), ".".join(p for p in parts[place + 1 :] if not p.isdecimal())


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _module_type(path: str) -> type[nn.Linear]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ConfigError(f"model.sites.module_types names {path}, which does not exist") from None
    if not (isinstance(found, type) and issubclass(found, nn.Linear)):
        raise ConfigError(f"model.sites.module_types names {path}, not a torch.nn.Linear")
    return found


def shared_inputs(
    model: PreTrainedModel, windows: Windows, sites: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Map each site to the first site that reads the same tensor (q, k, v; gate, up).

    Args:
        model: a causal language model, on any device, the meta device too.
        windows: of which a few tokens are used.
        sites: target layers by qualified name.

    Raises:
        ModelError: a site is not used; it is named.
    """
    seen: dict[int, tuple[str, Tensor]] = {}  # The tensor is kept alive so that ids stay unique.
    shared: dict[str, str] = {}

    def see(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shared[name] = seen.setdefault(id(inputs[0]), (name, inputs[0]))[0]

    with ExitStack() as stack, torch.no_grad():
        for name, site in sites.items():
            stack.callback(site.register_forward_pre_hook(partial(see, name)).remove)
        few = windows.few()
        # With a mask, transformers does not look at values; meta tensors have none.
        few.output(model, attention_mask=torch.ones_like(few.tokens, device=model.device))
    for name in sites:
        if name not in shared and expert_of(model, name) is not None:
            shared[name] = name  # None of the few tokens was routed to it.
        if name not in shared:
            raise ModelError(
                f"{name} is not used in the model's forward pass; exclude it (model.sites.exclude)"
            )
    return {name: shared[name] for name in sites}
