"""Find the target linear layers ("sites") of a model by module type and glob."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.errors import ConfigError, ModelError, NumericalError

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SiteSelection:
    """Selects target modules by globs of qualified names (`*` also matches dots) and by type.

    The default takes every linear layer inside the decoder blocks of Llama, Mistral, Qwen, OPT and
    GPT-NeoX, and leaves embeddings and the language-model head alone.
    """

    include: list[str] = field(default_factory=lambda: ["*.layers.*"])
    exclude: list[str] = field(default_factory=list)
    module_types: list[str] = field(default_factory=lambda: ["torch.nn.Linear"])


def find_sites(model: nn.Module, selection: SiteSelection) -> dict[str, nn.Linear]:
    """Return the target layers by qualified name, in model order, and check their weights.

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
    """Return the target layers by qualified name, in model order, whatever their weights hold.

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


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks: the longest list of modules of one type."""
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


def shared_inputs(
    model: PreTrainedModel, tokens: Tensor, sites: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Map each site to the first site that reads the same tensor (q, k, v; gate, up).

    Args:
        model: a causal language model, on any device, the meta device too.
        tokens: windows (windows, length), of which a few tokens are used.
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
        few = tokens[:1, :8].to(model.device)
        # With a mask, transformers does not look at values; meta tensors have none.
        model(input_ids=few, attention_mask=torch.ones_like(few), use_cache=False)
    for name in sites:
        if name not in shared:
            raise ModelError(
                f"{name} is not used in the model's forward pass; exclude it (model.sites.exclude)"
            )
    return {name: shared[name] for name in sites}
