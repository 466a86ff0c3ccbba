"""A corrected block as named tensors, which a store keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from iosvd.types import Factors, Site

_FACTORS = ("left", "right", "left_energy", "right_energy")
_DIAGONALS = ("output_diagonal", "input_diagonal")
_PARAMETER = "parameter"


@dataclass(frozen=True)
class BlockUpdate:
    """Changes that a correction makes to a block; names are those within the block."""

    sites: Mapping[str, Site]
    parameters: Mapping[str, Tensor]  # Of layers that are no sites, for instance norms.


def tensors_of(update: BlockUpdate, dense: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an update, but for weights that are the dense block's."""
    found = {f"{_PARAMETER}:{name}": value for name, value in update.parameters.items()}
    for name, site in update.sites.items():
        parts: dict[str, Tensor | None] = {"bias": site.bias}
        if site.factors is not None:
            parts |= {part: getattr(site.factors, part) for part in _FACTORS}
            parts |= {part: getattr(site, part) for part in _DIAGONALS}
        elif site.weight is not dense.get_submodule(name).weight:
            parts["weight"] = site.weight
        found |= {
            f"{part}:{name}": value.detach().contiguous()
            for part, value in parts.items()
            if value is not None
        }
    return found


def update_from(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Site], device: torch.device
) -> BlockUpdate:
    """Return the update of a block from its tensors, on a device.

    Args:
        tensors: as `tensors_of` returned them.
        sites: truncated.
        device: of the block.
    """
    by_part: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition(":")
        # Copied: tensors that are mapped from a file lie at odd addresses, where products round
        # otherwise.
        by_part.setdefault(name, {})[part] = value.to(device, copy=True)
    found = {name: _site(site, by_part.get(name, {})) for name, site in sites.items()}
    parameters = {name: parts[_PARAMETER] for name, parts in by_part.items() if _PARAMETER in parts}
    return BlockUpdate(found, parameters)


def _site(site: Site, parts: Mapping[str, Tensor]) -> Site:
    site = replace(site, bias=parts.get("bias"))
    if "left" not in parts:
        return replace(site, weight=parts["weight"]) if "weight" in parts else site
    return replace(
        site,
        factors=Factors(**{part: parts[part] for part in _FACTORS}),
        weight=site.weight.detach().to("meta"),  # Not kept beside its factors.
        output_diagonal=parts["output_diagonal"],
        input_diagonal=parts["input_diagonal"],
    )
