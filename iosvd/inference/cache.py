"""A cache of transformers that holds latents."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer


def allocate_static_layer_(cache: Cache, index: int, key: Tensor, value: Tensor) -> None:
    """Allocate a layer of a static cache for keys and values of these heads and widths.

    transformers allocates both for as many heads as keys have, at the first token, or, where a
    prefill in chunks is compiled, for the heads of the model's configuration before it.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if not isinstance(layer, StaticLayer):
        return
    if not layer.is_initialized:
        layer.lazy_initialization(key, value)
    for name, states in (("keys", key), ("values", value)):
        allocated: Tensor = getattr(layer, name)
        batch, heads, _, width = states.shape
        if allocated.shape[1] == heads and allocated.shape[3] == width:
            continue
        fresh = states.new_zeros(batch, heads, allocated.shape[2], width)
        setattr(layer, name, fresh)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(fresh)


def held_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values in a cache."""
    parts = ("keys", "values")
    tensors = [getattr(layer, part, None) for layer in cache.layers for part in parts]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
