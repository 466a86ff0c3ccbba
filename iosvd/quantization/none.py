"""Factors in the model's own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from iosvd.budget import Shape, SiteCost, sixteen_bits
from iosvd.quantization.base import Quantization
from iosvd.types import Site, Stored


@dataclass(frozen=True)
class NoQuantization(Quantization):
    """Every entry of every factor keeps the model's dtype, and counts as 16 bits."""

    @property
    def rounds(self) -> bool:
        return False

    def cost(self, shape: Shape) -> SiteCost:
        return sixteen_bits(shape)

    def __call__(
        self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        return {}
