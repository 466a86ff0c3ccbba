"""Check that positions count indices in the cache, as the rotation of latent keys assumes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iosvd.errors import ModelError


@dataclass(frozen=True)
class CallCheck:
    """A forward pre-hook of a decoder: refuses what its prepared attention would get wrong.

    Args:
        names: of the decoder's positional arguments.
        latent_k: whether keys are rotated by their index in the cache.
    """

    names: tuple[str, ...]
    latent_k: bool

    @classmethod
    def of(cls, decoder: nn.Module, latent_k: bool) -> CallCheck:
        return cls(tuple(inspect.signature(decoder.forward).parameters), latent_k)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ModelError if attentions are asked for, or positions do not count indices."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if given.get("output_attentions"):
            raise ModelError("a model that was prepared for generation returns no attentions")
        positions = given.get("position_ids")
        if not self.latent_k or positions is None or torch.compiler.is_compiling():
            return
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if not positions_count(positions, _visible(given.get("attention_mask")), past):
            raise ModelError(
                "positions do not count the visible tokens before them, so latent keys cannot be"
                " rotated by their index in the cache; pad on the left of the first prompt alone"
                " (padding_side='left'), or use k_cache=full"
            )


def positions_count(positions: Tensor, visible: Tensor | None, past: int) -> bool:
    """Whether every visible new token's position is its index minus the row's first visible one.

    Args:
        positions: of the new tokens, (rows, new).
        visible: of all tokens, (rows, past + new) or more; None: all are.
        past: tokens in the cache.
    """
    indices = past + torch.arange(positions.shape[-1], device=positions.device)
    if visible is None:
        return bool((positions == indices).all())
    visible = visible.to(positions.device)
    first = visible.int().argmax(-1, keepdim=True)
    new = visible[:, past : past + positions.shape[-1]]
    return bool(((positions == indices - first) | ~new).all())


def _visible(mask: Any) -> Tensor | None:
    """Return the tokens that the last query sees, (rows, tokens)."""
    if isinstance(mask, dict):  # By kind of layer.
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:  # (rows, 1, queries, keys), true or 0 where a key is seen.
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    return mask.bool()
