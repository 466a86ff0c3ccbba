"""A matrix whose rows are stored in two widths: some as int8 with a scale, the others in 16 bits.

A row holds the weights of one output of the matrix, or of one input. Either way the tensors keep
the orientation (out, in) of a linear layer's weight, in which products are fast. No product expands
the whole matrix; on a GPU, the int8 part is expanded temporarily.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from iosvd.budget import ENTRY_BITS
from iosvd.errors import NumericalError
from iosvd.layers.int8 import Code, levels_of, quantize_rows

SCALE_BITS = 16
PACKED_ROWS = 8  # The packed kernel is faster up to this many tokens (make bench).
BLOCK_ENTRIES = 2**20  # Entries of int8 expanded at a time on a CPU (make bench).
_PACKED_WIDTH = 32  # The kernel reads blocks of this size, past the end of other rows, and crashes.


@dataclass(frozen=True)
class RowLayout:
    """The layout of a matrix in rows, which the tensors do not show; config.json stores it."""

    int8: int  # Rows stored as int8.
    by_output: bool  # A row holds the weights of one output of the matrix, else of one input.
    ordered: bool  # Whether an order is stored; else the int8 rows are the first ones.
    code: Code = Code.linear

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as JSON."""
        return {**asdict(self), "code": self.code.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RowLayout:
        """Read the result of `to_dict`.

        Raises:
            TypeError, ValueError, KeyError: it is something else.
        """
        layout = cls(**{**values, "code": Code(values["code"])})
        if (type(layout.int8), type(layout.by_output), type(layout.ordered)) != (int, bool, bool):
            raise TypeError("int8 is a number, by_output and ordered are true or false")
        return layout


class Rows(NamedTuple):
    """The tensors of a matrix (out, in) of R rows, b of them in int8.

    `order` is the index that restores the order of outputs after int8 and 16-bit rows were
    multiplied, or that brings inputs into the order of the stored rows.
    """

    kept: Tensor  # (R − b, in) or, where a row is an input, (out, R − b); 16 bits
    codes: Tensor  # (b, in) or (out, b), int8
    scale: Tensor  # (b,), float16
    order: Tensor | None  # (R,), int16 or int32

    @property
    def bits(self) -> int:
        """Bits stored."""
        stored = ENTRY_BITS * self.kept.numel() + 8 * self.codes.numel()
        stored += SCALE_BITS * self.scale.numel()
        return stored + (0 if self.order is None else 8 * self.order.nbytes)


def int8_row_bits(columns: int) -> int:
    """Bits of one int8 row."""
    return 8 * columns + SCALE_BITS


def half_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the 16-bit dtype of the other rows in a model of this dtype."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def order_dtype(rows: int) -> torch.dtype:
    """Return the smallest integer type that numbers the rows."""
    return torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32


def store_rows(
    matrix: Tensor,
    int8: Tensor,
    dtype: torch.dtype,
    by_output: bool,
    what: str,
    code: Code = Code.linear,
    first: bool = False,
) -> tuple[Rows, RowLayout]:
    """Store a matrix.

    Args:
        matrix: (out, in), float32 or better.
        int8: which rows become int8, boolean, (out,) or (in,).
        dtype: of the other rows, 16 bits wide.
        by_output: what a row is.
        what: the site, for errors.
        code: of the int8 rows.
        first: whether the int8 rows are the first ones, so that no order is stored.

    Raises:
        NumericalError: an entry or a scale is beyond the range of 16 bits.
    """
    rows, int8 = matrix if by_output else matrix.T, int8.to(matrix.device)
    count = int(int8.sum())
    kept = rows[~int8].to(dtype)
    if not torch.isfinite(rows.to(dtype)).all():  # Int8 rows too: products with them are in fp16.
        raise NumericalError(
            f"a weight of {what} is not finite in {str(dtype).removeprefix('torch.')} (fp16 ends at"
            " 65504); try model.dtype=bfloat16 or exclude the site (model.sites.exclude)"
        )
    codes, scale = quantize_rows(rows[int8], code, what)
    ordered = 0 < count < len(rows) and not first
    order = None
    if ordered:
        stored = torch.cat([int8.nonzero()[:, 0], (~int8).nonzero()[:, 0]])
        order = (stored.argsort() if by_output else stored).to(order_dtype(len(rows)))
    if not by_output:
        kept, codes = kept.T, codes.T
    # Contiguous copies: views would keep the whole matrix, and safetensors refuses them.
    stored_rows = Rows(kept.contiguous(), codes.contiguous(), scale, order)
    return stored_rows, RowLayout(count, by_output, ordered, code)


def restore(rows: Rows, layout: RowLayout, accumulate: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix (out, in) that the rows represent."""
    axis = 0 if layout.by_output else 1
    scale = rows.scale.to(accumulate)
    decoded = levels_of(rows.codes, layout.code, accumulate) * scale.unsqueeze(1 - axis)
    stacked = torch.cat([decoded, rows.kept.to(accumulate)], dim=axis)
    if rows.order is None:
        return stacked
    order = rows.order.int()
    return stacked.index_select(axis, order if layout.by_output else order.argsort())


def multiply(x: Tensor, rows: Rows, layout: RowLayout) -> Tensor:
    """Return x Aᵀ for inputs (…, in) and the matrix A (out, in) that the rows represent."""
    return _by_output(x, rows, layout) if layout.by_output else _by_input(x, rows, layout)


def _by_output(x: Tensor, rows: Rows, layout: RowLayout) -> Tensor:
    parts = []
    if layout.int8:
        if x.dtype == torch.float16:
            parts.append(linear(x, _weights(rows, layout)))
        else:
            parts.append(_scaled(_times_levels(x, rows.codes, layout.code), rows.scale))
    if len(rows.kept):
        parts.append(linear(x, rows.kept.to(x.dtype)))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if rows.order is None else y.index_select(-1, rows.order.int())


def _by_input(x: Tensor, rows: Rows, layout: RowLayout) -> Tensor:
    if rows.order is not None:
        x = x.index_select(-1, rows.order.int())
    if not layout.int8:
        return linear(x, rows.kept.to(x.dtype))
    quantized, kept = x.split([layout.int8, x.shape[-1] - layout.int8], dim=-1)
    if x.dtype == torch.float16:
        y = linear(quantized, _weights(rows, layout))
    else:
        y = _times_levels(_scaled(quantized, rows.scale), rows.codes, layout.code)
    return y + linear(kept, rows.kept.to(x.dtype)) if kept.shape[-1] else y


def _weights(rows: Rows, layout: RowLayout) -> Tensor:
    """Return the int8 part (out, in) in fp16, whose range integer sums and scaled inputs leave."""
    scale = rows.scale[:, None] if layout.by_output else rows.scale
    return levels_of(rows.codes, layout.code, torch.float16) * scale


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    # The product of bfloat16 and float16 is float32: bfloat16 would round the scale itself.
    return (values * scale).to(values.dtype)


def _times_levels(x: Tensor, codes: Tensor, code: Code) -> Tensor:
    """Return x times the transposed levels (out, in), without their scales."""
    if not _packed_is_faster(x, code):
        # In blocks on a CPU: a temporary of the whole layer costs more page faults than products.
        entries = BLOCK_ENTRIES if x.device.type == "cpu" else codes.numel()
        blocks = codes.split(max(1, entries // max(1, codes.shape[1])))
        products = [linear(x, levels_of(block, code, x.dtype)) for block in blocks]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    ones = torch.ones(len(codes), dtype=x.dtype, device=x.device)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return torch._weight_int8pack_mm(flat, codes, ones).unflatten(0, x.shape[:-1])


def _packed_is_faster(x: Tensor, code: Code) -> bool:
    """Whether torch's packed kernel works and pays off: few rows of bfloat16 on a CPU."""
    few = 0 < x.numel() <= PACKED_ROWS * x.shape[-1] and x.shape[-1] % _PACKED_WIDTH == 0
    suited = x.dtype == torch.bfloat16 and x.device.type == "cpu" and code is Code.linear
    # The kernel has no derivative.
    return few and suited and not (torch.is_grad_enabled() and x.requires_grad)
