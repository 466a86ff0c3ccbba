"""Memory of a prepared model's cache, computed before it is filled."""

from __future__ import annotations

from torch import nn

from iosvd.errors import ModelError
from iosvd.inference.attention import GenerationAttention
from iosvd.system.machine import GIB, free_bytes


def cache_bytes_per_token(model: nn.Module) -> int:
    """Return the bytes that a prepared model caches for one token of one sequence."""
    modules = (m for m in model.modules() if isinstance(m, GenerationAttention))
    return sum(sum(m.cache_entries) * m.itemsize for m in modules)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights and buffers, and of tensors derived from them.

    Storage that several tensors share counts once.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += module.derived if isinstance(module, GenerationAttention) else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def check_fits(model: nn.Module, batch: int, tokens: int) -> None:
    """Raise ModelError if the cache of so many sequences of so many tokens does not fit.

    Args:
        model: a prepared model.
        batch: sequences.
        tokens: of each, prompt and answer.
    """
    needed = batch * tokens * cache_bytes_per_token(model)
    free = free_bytes(next(model.parameters()).device)
    if needed > free:
        raise ModelError(
            f"the cache of {batch} × {tokens} tokens takes {needed / GIB:.2f} GiB and"
            f" {max(0, free) / GIB:.2f} GiB are free, {(needed - free) / GIB:.2f} GiB too few; take"
            " a smaller batch, fewer tokens, or (where they are not yet) latent caches"
        )
