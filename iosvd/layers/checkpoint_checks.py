"""Check that config.json and the tensors of a checkpoint agree; transformers only warns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from iosvd.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it, such as F16.


_FLOATING = ("F64", "F32", "F16", "BF16")
_EXACT = {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32",
          torch.float16: "F16"}  # fmt: skip


def tensors_in(files: Sequence[str]) -> dict[str, StoredTensor]:
    """Return the tensors in a checkpoint's files, from their headers.

    Raises:
        CheckpointError: a file is not safetensors.
    """
    found = {}
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise CheckpointError(
                f"{file} is no safetensors file, which compressed checkpoints are read from;"
                " save the checkpoint again"
            )
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                stored = opened.get_slice(name)
                found[name] = StoredTensor(tuple(stored.get_shape()), stored.get_dtype())
    return found


def check_tensors(name: str, layer: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Compare a layer, as config.json describes it, with the tensors in the files.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape or type; the site is
            named.
    """
    # A file written by a model without head has names without the prefix of its body.
    prefix = next((p for p in (name, name.partition(".")[2]) if f"{p}.weight" in stored), name)
    found = {
        n.removeprefix(f"{prefix}."): s for n, s in stored.items() if n.startswith(f"{prefix}.")
    }
    parameters = dict(layer.named_parameters())
    for part, tensor in layer.state_dict().items():
        there = found.pop(part, None)
        if there is None:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}.{part}; it is incomplete, save it again"
            )
        # Parameters are cast to the type that the model is loaded in; codes and scales never are.
        types = _FLOATING if part in parameters else (_EXACT[tensor.dtype],)
        if there.shape != tuple(tensor.shape) or there.dtype not in types:
            raise CheckpointError(
                f"config.json and the weights disagree about {name}: {part} should be"
                f" {tuple(tensor.shape)} in {' or '.join(types)} and is {there.shape} in"
                f" {there.dtype}; save the checkpoint again"
            )
    if found:
        raise CheckpointError(
            f"config.json and the weights disagree about {name}: it describes no"
            f" {', '.join(sorted(found))}; save the checkpoint again"
        )


def check_values(layer: nn.Module, name: str) -> None:
    """Check a layer's orders and scales, which the headers of the files do not show.

    Raises:
        CheckpointError: an order is not a permutation, or a scale is negative or not finite.
    """
    for part, tensor in layer.named_buffers():
        if tensor.is_meta:
            continue
        whole = True
        if part.endswith("order"):
            places = tensor.sort().values
            whole = torch.equal(places, torch.arange(len(places)).to(places))
        elif part.endswith("scale"):
            whole = bool((torch.isfinite(tensor) & (tensor >= 0)).all())
        if not whole:
            raise CheckpointError(
                f"{part} of {name} in the checkpoint is damaged; save the checkpoint again"
            )
