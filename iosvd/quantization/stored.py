"""A site whose matrices are stored in rows of two widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iosvd.layers.int8 import Code
from iosvd.layers.modules import StoredLinear, empty_layer
from iosvd.layers.rows import RowLayout, Rows, restore, store_rows
from iosvd.quantization.scores import second_order
from iosvd.types import Matrix, Site


@dataclass(frozen=True)
class StoredRows:
    """The rows of a site's matrices, by the name of the matrix; rank None: the site is dense."""

    rank: int | None
    rows: Mapping[str, Rows]
    layouts: Mapping[str, RowLayout]
    rounding_loss: float

    @property
    def bits(self) -> int:
        return sum(rows.bits for rows in self.rows.values())

    @property
    def rounded(self) -> tuple[int, int]:
        int8 = sum(layout.int8 for layout in self.layouts.values())
        kept = sum(
            rows.kept.shape[0 if self.layouts[name].by_output else 1]
            for name, rows in self.rows.items()
        )
        return int8, int8 + kept

    def module(self, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, nn.Linear | StoredLinear)
        like = next(layer.parameters())
        if (
            self.rank is None
            and not self.rounded[0]
            and like.dtype == self.rows["weight"].kept.dtype
        ):
            return layer  # Nothing is rounded.
        new = empty_layer(
            layer.in_features,
            layer.out_features,
            self.rank,
            self.layouts,
            biased=layer.bias is not None,
            device=like.device,
            dtype=like.dtype,
        )
        with torch.no_grad():
            for name, rows in self.rows.items():
                for mine, theirs in zip(new.rows(name), rows, strict=True):
                    if mine is not None and theirs is not None:
                        mine.copy_(theirs)
        return new.replacing(layer)


def store_site(
    site: Site,
    int8: Mapping[str, Tensor],
    by_output: Mapping[str, bool],
    dtype: torch.dtype,
    code: Code = Code.linear,
    first: bool = False,
) -> StoredRows:
    """Store a site with the given rows in int8.

    Args:
        site: what is stored.
        int8: by matrix, which rows; booleans.
        by_output: by matrix, whether a row holds the weights of one output.
        dtype: of the other rows.
        code: of the int8 rows.
        first: whether the int8 rows are the first ones.
    """
    rows: dict[str, Rows] = {}
    layouts: dict[str, RowLayout] = {}
    loss = 0.0
    for name, matrix in site.matrices().items():
        rows[name], layouts[name] = store_rows(
            matrix.values, int8[name], dtype, by_output[name], site.name, code, first
        )
        loss += _loss(matrix, rows[name], layouts[name])
    rank = None if site.factors is None else site.factors.rank
    return StoredRows(rank, rows, layouts, loss)


def _loss(matrix: Matrix, rows: Rows, layout: RowLayout) -> float:
    error = restore(rows, layout).to(matrix.values) - matrix.values
    return float(second_order(matrix, error, by_output=True).sum())
