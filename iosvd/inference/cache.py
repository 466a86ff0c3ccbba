"""A cache of transformers that holds latents."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer


def open_(cache: Cache, index: int, key: Tensor, value: Tensor) -> None:
    """Let a static cache hold keys and values of different numbers of heads.

    transformers allocates its tensors at the first token, both for as many heads as keys have.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if not isinstance(layer, StaticLayer) or layer.is_initialized:
        return
    layer.lazy_initialization(key, value)
    assert layer.values is not None
    if value.shape[1] != layer.values.shape[1]:
        batch, heads, _, width = value.shape
        layer.values = value.new_zeros(batch, heads, layer.max_cache_len, width)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(layer.values)


def held_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values in a cache."""
    parts = ("keys", "values")
    tensors = [getattr(layer, part, None) for layer in cache.layers for part in parts]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
