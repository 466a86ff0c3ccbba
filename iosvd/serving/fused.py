"""Layers that a server fuses (q, k and v; gate and up), from the factors of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Part:
    """One of the layers that are fused."""

    outputs: int
    rank: int | None  # None: dense.

    @property
    def rows(self) -> int:
        """Rows of its first matrix: the right factor's, or the weight's."""
        return self.outputs if self.rank is None else self.rank

    @property
    def left_entries(self) -> int:
        return 0 if self.rank is None else self.outputs * self.rank


@dataclass(frozen=True)
class Fused:
    """Several layers with one input.

    Their first matrices lie under each other in one (rows, in); their left factors follow each
    other in one vector, since they differ in rank.
    """

    parts: Sequence[Part]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def left_entries(self) -> int:
        return sum(part.left_entries for part in self.parts)

    def first_of(self, weight: Tensor, index: int) -> Tensor:
        """Return the rows (rows of the part, in) of one part."""
        return weight.split([part.rows for part in self.parts])[index]

    def left_of(self, left: Tensor, index: int) -> Tensor:
        """Return the left factor (outputs, rank) of one part."""
        part = self.parts[index]
        ends = list(accumulate(p.left_entries for p in self.parts))
        entries = left[ends[index] - part.left_entries : ends[index]]
        return entries.view(part.outputs, part.rank or 0)

    def product(self, x: Tensor, weight: Tensor, left: Tensor) -> Tensor:
        """Return the outputs of all parts (…, Σ outputs), one after the other."""
        firsts = linear(x, weight).split([part.rows for part in self.parts], dim=-1)
        outputs = [
            first if part.rank is None else linear(first, self.left_of(left, index))
            for index, (part, first) in enumerate(zip(self.parts, firsts, strict=True))
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def shard_index(shard: str | int | None) -> int:
    """Return which part a server means by its name of a shard: q, k, v, or a number."""
    if isinstance(shard, str):
        return "qkv".index(shard)
    return 0 if shard is None else shard
