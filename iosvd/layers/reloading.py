"""Check that a saved checkpoint loads back as the model it was saved from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.errors import CheckpointError, one_line
from iosvd.system.machine import out_of_memory

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


def check_reloads(model: PreTrainedModel, folder: Path) -> None:
    """Load a checkpoint into main memory and compare all its tensors to the bit.

    Args:
        model: that was saved.
        folder: of the checkpoint.

    Raises:
        CheckpointError: it cannot be loaded, or a tensor is different.
    """
    try:
        loaded = type(model).from_pretrained(folder, dtype=model.dtype)
    # transformers and safetensors raise many types for a checkpoint that they cannot load.
    except Exception as error:
        if out_of_memory(error):
            raise
        raise CheckpointError(f"{_failed(model)}: {one_line(error)[:300]}") from error
    found = _tensors(loaded)
    for name, tensor in _tensors(model).items():
        other = found.pop(name, None)
        if other is None or other.dtype != tensor.dtype or not torch.equal(other, tensor.cpu()):
            raise CheckpointError(f"{_failed(model)}: {name} is different")
    if found:
        raise CheckpointError(f"{_failed(model)}: it has {min(found)} besides")


def _failed(model: PreTrainedModel) -> str:
    return (
        f"the checkpoint of this {type(model).__name__} does not load back as it was saved, so it"
        " was removed; try another version of transformers, or report it"
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, also those that are not saved.

    Frequencies that are chosen anew for every length of the input are left out.
    """
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    chosen = {n.replace("original_inv_freq", "inv_freq") for n in found if "original_inv_freq" in n}
    return {name: tensor for name, tensor in found.items() if name not in chosen}
