"""Find the target linear layers ("sites") of a model by module type and glob."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from iosvd.errors import ConfigError, ModelError, NumericalError


@dataclass(frozen=True)
class SiteSelection:
    """Which modules are targets: their qualified names by glob (`*` also matches dots), and types.

    The default takes every linear layer inside the decoder blocks of Llama, Mistral, Qwen, OPT and
    GPT-NeoX, and leaves embeddings and the language-model head alone.
    """

    include: list[str] = field(default_factory=lambda: ["*.layers.*"])
    exclude: list[str] = field(default_factory=list)
    module_types: list[str] = field(default_factory=lambda: ["torch.nn.Linear"])


def find_sites(model: nn.Module, selection: SiteSelection) -> dict[str, nn.Linear]:
    """Return the target layers by qualified name, in the order of the model, fit for compression.

    Raises:
        ConfigError: a module type does not exist or is not a linear layer.
        ModelError: nothing matches.
        NumericalError: a weight is not finite.
    """
    sites = find_linears(model, selection)
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
    """Return the target layers by qualified name, in the order of the model, whatever they hold.

    Raises:
        ConfigError: a module type does not exist or is not a linear layer.
        ModelError: nothing matches.
    """
    types = tuple(_module_type(path) for path in selection.module_types)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, types)}
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


def in_groups(
    sites: Iterable[str], size_bytes: Callable[[list[str]], int], limit_bytes: float
) -> list[list[str]]:
    """Divide sites, in their order, into as few groups as a limit allows, one site at least each.

    Args:
        sites: qualified names.
        size_bytes: of a group.
        limit_bytes: of every group.
    """
    groups: list[list[str]] = []
    for site in sites:
        if groups and size_bytes([*groups[-1], site]) <= limit_bytes:
            groups[-1].append(site)
        else:
            groups.append([site])
    return groups


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the longest list of modules of one kind: the decoder's."""
    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len({*map(type, m)}) == 1
    ]
    return list(max(lists, key=len, default=()))


def layer_and_role(site: str) -> tuple[int, str]:
    """Split a site's name at its first number: model.layers.3.mlp.up_proj is (3, mlp.up_proj)."""
    parts = site.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None:
        return 0, site
    return int(parts[place]), ".".join(parts[place + 1 :])


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
