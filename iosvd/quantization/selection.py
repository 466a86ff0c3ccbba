"""Choose the rows that become int8 so that all matrices together fit a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from iosvd.budget import ENTRY_BITS
from iosvd.layers.rows import int8_row_bits, order_dtype

Key = TypeVar("Key")


@dataclass(frozen=True)
class ScoredRows:
    """The rows of a matrix: their width, and the score of rounding each."""

    columns: int
    scores: Tensor  # (R,)

    @property
    def saved_bits(self) -> int:
        """Bits that a row in int8 saves; negative for rows of one entry, whose scale is larger."""
        return ENTRY_BITS * self.columns - int8_row_bits(self.columns)

    def bits(self, int8: int) -> int:
        """Bits of the matrix with this many rows in int8; mixed matrices also store an order."""
        rows = len(self.scores)
        mixed = 0 < int8 < rows
        order = rows * torch.iinfo(order_dtype(rows)).bits if mixed else 0
        return ENTRY_BITS * self.columns * rows - int8 * self.saved_bits + order


def choose_int8(matrices: Mapping[Key, ScoredRows], limit: int) -> dict[Key, Tensor]:
    """Return the rows of each matrix that become int8: as few as fit, those with the lowest scores.

    Starting with all rows in int8 (if that saves anything), the rows with the highest scores go
    back to 16 bits as long as they fit; a row that does not fit is skipped for smaller ones. The
    bytes used end within one row of the limit, plus that row's order if no matrix is mixed.

    Args:
        matrices: the scores of all rows.
        limit: bits for all of them.
    """
    int8 = {key: torch.full((len(m.scores),), m.saved_bits > 0) for key, m in matrices.items()}
    counts = {key: int(chosen.sum()) for key, chosen in int8.items()}
    free = limit - sum(matrix.bits(counts[key]) for key, matrix in matrices.items())
    waiting = _by_descending_score(matrices)
    smallest = min((m.saved_bits for m in matrices.values() if m.saved_bits > 0), default=0)
    fitted = True
    while fitted and free >= smallest:
        fitted, passed_over = False, []
        for key, row in waiting:
            matrix, count = matrices[key], counts[key]
            extra = matrix.bits(count - 1) - matrix.bits(count)
            if matrix.saved_bits > 0 and extra <= free:
                int8[key][row], counts[key], fitted = False, count - 1, True
                free -= extra
            else:
                passed_over.append((key, row))
        waiting = passed_over  # A matrix whose last row was put back has freed its order.
    for key in sorted(counts, key=lambda key: counts[key]):
        whole = matrices[key].bits(0) - matrices[key].bits(counts[key])
        if counts[key] and whole <= free:  # All that is left of it, for the order it frees.
            int8[key][:] = False
            free -= whole
    return int8


def _by_descending_score(matrices: Mapping[Key, ScoredRows]) -> list[tuple[Key, int]]:
    keys = list(matrices)
    owner = torch.cat([torch.full((len(matrices[k].scores),), i) for i, k in enumerate(keys)])
    place = torch.cat([torch.arange(len(matrices[key].scores)) for key in keys])
    scores = torch.cat([matrices[key].scores.double().cpu() for key in keys])
    order = scores.argsort(descending=True, stable=True)
    return [
        (keys[i], row) for i, row in zip(owner[order].tolist(), place[order].tolist(), strict=True)
    ]
