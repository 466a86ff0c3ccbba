"""Rotary position embeddings by index in the cache.

A score depends only on the distance between query and key. Keys that are rebuilt from latents are
therefore rotated by their index in the cache, and the query by its own: the angles are then the
same for every row of a batch, whatever its padding on the left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FIRST_LENGTH = 1024
_FEW = 8  # Places that are compared.


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads (…, tokens, D) by angles whose cosines and sines are (…, tokens, D)."""
    first, second = x.chunk(2, dim=-1)
    (cos1, cos2), (sin1, sin2) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    rotated = (
        torch.addcmul(first * cos1, second, sin1, value=-1),
        torch.addcmul(second * cos2, first, sin2),
    )
    return torch.cat(rotated, dim=-1)


class RotaryTable:
    """Cosines and sines (length, D) of a model's rotary embeddings, from place 0 on.

    One table per device serves all blocks there. It grows when a longer cache asks for it.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        self._embeddings = embeddings
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def is_fixed(self, furthest: int, like: Tensor) -> bool:
        """Whether angles depend on places alone, not on how many there are.

        Args:
            furthest: a place beyond the longest context, which tables may reach.
            like: on the device of the model.
        """
        first = torch.arange(_FEW, device=like.device)[None]
        with_last = torch.cat([first, first.new_full((1, 1), furthest)], dim=1)
        # Frequencies for long contexts stay until a short one comes.
        alone, longer = (self._embeddings(like, places)[0] for places in (first, with_last))
        return torch.equal(alone, longer[:, :_FEW])

    def up_to(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first `length` rows or more, on the device and in the dtype of a tensor."""
        table = self._tables.get((like.device, like.dtype))
        if table is None or len(table[0]) < length:
            longer = max(_FIRST_LENGTH, 1 << (length - 1).bit_length())
            positions = torch.arange(longer, device=like.device)[None]
            cos, sin = self._embeddings(like[:1], positions)
            table = self._tables[like.device, like.dtype] = (
                cos[0].to(like.device),
                sin[0].to(like.device),
            )
        return table
