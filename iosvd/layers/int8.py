"""Eight bits per entry, one fp16 scale per row: the primitive of all quantisations (METHODS 6)."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from iosvd.errors import NumericalError

LARGEST_CODE = 127
_LARGEST_SCALE = torch.finfo(torch.float16).max


class Code(Enum):
    """The 255 or 256 multiples of a row's scale that entries are rounded to.

    linear: −127 … 127. dynamic: the 8-bit dynamic tree (arXiv 2110.02861) on [−1, 1], whose steps
    are proportional to the value over seven decades. Dobi-SVD (arXiv 2502.02723) stores factors in
    a non-uniform 8-bit code for their bell-shaped entries; it does not state which one, and this is
    the code that its library provides.
    """

    linear = "linear"
    dynamic = "dynamic"


def _dynamic_levels() -> Tensor:
    positive = []
    for exponent in range(7):
        # 2^e fractions of a decade, each the middle of its share of [0.1, 1].
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float64)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6))
    ascending = torch.cat(positive)
    return torch.cat([-ascending, torch.tensor([0.0, 1.0]), ascending]).sort().values.float()


DYNAMIC_LEVELS = _dynamic_levels()  # Ascending, (256,).


def quantize_rows(rows: Tensor, code: Code, what: str) -> tuple[Tensor, Tensor]:
    """Round each row to the nearest codes.

    The scale is the smallest fp16 number that reaches the row's largest entry, so a linear code is
    wrong by at most half a scale. A row of zeros has scale 0 and is stored exactly.

    Args:
        rows: (R, C), float32 or better.
        code: what the codes mean.
        what: the site, for the error.

    Returns:
        Codes (R, C), int8, and scales (R,), float16.

    Raises:
        NumericalError: a row is not finite, or its scale overflows fp16.
    """
    reach = LARGEST_CODE if code is Code.linear else 1
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    if not torch.isfinite(largest).all():
        raise NumericalError(f"the weights of {what} have NaN or infinity; check the checkpoint")
    if (largest / reach > _LARGEST_SCALE).any():
        raise NumericalError(
            f"the int8 scale of a row of {what} is {float(largest.max()) / reach:.3g}, beyond"
            f" fp16's {_LARGEST_SCALE:g}; exclude the site (model.sites.exclude)"
        )
    scale = _at_least(largest / reach)
    relative = rows / torch.where(scale > 0, scale, 1).to(rows.dtype)[:, None]
    if code is Code.linear:
        return relative.round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scale
    levels = DYNAMIC_LEVELS.to(rows)
    place = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
    return (place - 128).to(torch.int8), scale


def levels_of(codes: Tensor, code: Code, dtype: torch.dtype) -> Tensor:
    """Return the multiples of the scale that codes stand for, in a floating-point type."""
    if code is Code.linear:
        return codes.to(dtype)
    return DYNAMIC_LEVELS.to(codes.device, dtype)[codes.int() + 128]


def _at_least(values: Tensor) -> Tensor:
    """Return the smallest fp16 numbers that are no smaller, for values from 0 to fp16's largest."""
    nearest = values.to(torch.float16)
    below = nearest.to(values.dtype) < values
    # The next fp16 number is the next integer in bits.
    above = (nearest.view(torch.int16) + 1).view(torch.float16)
    return torch.where(below, above, nearest)
