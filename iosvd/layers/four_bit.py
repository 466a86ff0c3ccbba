"""Dense weights in four bits, round to nearest: the baseline that low rank must beat.

Symmetric codes −7 … 7, two to a byte, and one fp16 scale for every group of a row's entries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from iosvd.errors import NumericalError
from iosvd.layers.modules import CompressedLinear

LARGEST_CODE = 7
_OFFSET = 8  # Codes are stored as 1 … 15.


def quantize_groups(weight: Tensor, group: int, what: str) -> tuple[Tensor, Tensor]:
    """Round a weight (m, n) to four bits.

    Returns:
        Codes (m, ⌈n/2⌉), uint8, two to a byte, and scales (m, ⌈n/group⌉), float16.

    Raises:
        NumericalError: the weight is not finite, or a scale overflows fp16.
    """
    m, n = weight.shape
    groups = -(-n // group)
    grouped = pad(weight, (0, groups * group - n)).view(m, groups, group)
    scale = (grouped.abs().amax(2) / LARGEST_CODE).to(torch.float16)
    if not torch.isfinite(scale * LARGEST_CODE).all():
        raise NumericalError(
            f"the 4-bit weights of {what} are not finite in fp16; exclude it (model.sites.exclude)"
        )
    divisor = torch.where(scale > 0, scale, 1).to(weight.dtype)[:, :, None]
    codes = (grouped / divisor).round().clamp(-LARGEST_CODE, LARGEST_CODE) + _OFFSET
    flat = codes.view(m, -1)[:, :n].to(torch.uint8)
    even = pad(flat, (0, n % 2), value=_OFFSET)
    return even[:, ::2] | even[:, 1::2] << 4, scale


def restore_groups(codes: Tensor, scale: Tensor, columns: int, group: int) -> Tensor:
    """Return the weight (m, columns), in the type of the scales."""
    unpacked = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, :columns]
    signed = unpacked.to(torch.int8) - _OFFSET
    return signed * scale.repeat_interleave(group, dim=1)[:, :columns]


def four_bit_bits(m: int, n: int, group: int) -> int:
    """Bits stored for a weight (m, n)."""
    return 8 * m * -(-n // 2) + 16 * m * -(-n // group)


class FourBitLinear(CompressedLinear):
    """y = W x + bias with W in four bits; `weight` holds the codes, so no dense model loads it."""

    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.group = group
        packed, groups = -(-in_features // 2), -(-in_features // group)
        codes = torch.empty(out_features, packed, device=device, dtype=torch.uint8)
        scale = torch.empty(out_features, groups, device=device, dtype=torch.float16)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)

    def product(self) -> Tensor:
        return restore_groups(self.weight, self.scale, self.in_features, self.group)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.product().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"
