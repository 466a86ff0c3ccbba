"""Whether config.json and the tensors of a checkpoint agree; transformers only warns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from iosvd.errors import CheckpointError


def shapes_in(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in a checkpoint's files, from their headers.

    Raises:
        CheckpointError: a file is not safetensors.
    """
    shapes = {}
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise CheckpointError(
                f"{file} is no safetensors file, which compressed checkpoints are read from;"
                " save the checkpoint again"
            )
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes


def check_shapes(name: str, layer: nn.Module, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a layer, as config.json describes it, with the shapes of the tensors in the files.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape; the site is named.
    """
    # A file written by a model without head has names without the prefix of its body.
    prefix = next((p for p in (name, name.partition(".")[2]) if f"{p}.weight" in stored), name)
    found = {
        n.removeprefix(f"{prefix}."): s for n, s in stored.items() if n.startswith(f"{prefix}.")
    }
    for part, tensor in layer.state_dict().items():
        shape = found.pop(part, None)
        if shape is None:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}.{part}; it is incomplete, save it again"
            )
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"config.json and the weights disagree about {name}: {part} should be"
                f" {tuple(tensor.shape)} and is {shape}; save the checkpoint again"
            )
    if found:
        raise CheckpointError(
            f"config.json and the weights disagree about {name}: it describes no"
            f" {', '.join(sorted(found))}; save the checkpoint again"
        )


def check_rows(layer: nn.Module, name: str) -> None:
    """Check what shapes cannot tell of a layer's rows.

    Raises:
        CheckpointError: an order that is none, or a scale that is not a finite number.
    """
    for part, tensor in layer.named_buffers():
        if tensor.is_meta:
            continue
        if part.endswith("order"):
            places = tensor.sort().values
            whole = torch.equal(places, torch.arange(len(places)).to(places))
        else:
            whole = not part.endswith("scale") or bool(torch.isfinite(tensor).all())
        if not whole:
            raise CheckpointError(
                f"{part} of {name} in the checkpoint is damaged; save the checkpoint again"
            )
