"""The dense model rounded to nearest, at the same bytes: the baseline of plain quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iosvd.budget import Shape, SiteCost
from iosvd.errors import check_at_least
from iosvd.layers.four_bit import FourBitLinear, four_bit_bits, quantize_groups, restore_groups
from iosvd.layers.rows import restore
from iosvd.quantization.base import Quantization
from iosvd.quantization.scores import second_order
from iosvd.quantization.selection import ScoredRows, choose_int8
from iosvd.quantization.stored import StoredRows, store_site
from iosvd.types import Site, Stored


@dataclass(frozen=True)
class RoundToNearest(Quantization):
    """Store dense weights with as many bits as the ratio allows, without any calibration.

    If int8 rows fit (from a ratio of about 0.5), the rows with the largest rounding error stay in
    16 bits as far as the budget allows. Below, weights are 4-bit in groups, and those that gain
    most per bit are int8.
    """

    group: int = 128  # Entries of a row that share a 4-bit scale, as in common 4-bit formats.

    def __post_init__(self) -> None:
        check_at_least(1, group=self.group)

    def cost(self, shape: Shape) -> SiteCost:
        fewest = four_bit_bits(shape.m, shape.n, self.group)
        # One rank costs the dense weight: no site is ever factorised.
        return SiteCost(dense=fewest, fixed=0, component=fewest)

    def __call__(
        self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        eight = {name: _all_int8(site, dtype) for name, site in sites.items()}
        if sum(stored.bits for stored in eight.values()) <= limit:
            return _some_in_sixteen(sites, eight, limit, dtype)
        four = {name: _four_bit(site, self.group) for name, site in sites.items()}
        return _some_in_eight(sites, four, eight, limit)


@dataclass(frozen=True)
class StoredFourBit:
    """A dense weight in four bits."""

    codes: Tensor  # (m, ⌈n/2⌉)
    scale: Tensor  # (m, ⌈n/group⌉)
    columns: int
    group: int
    rounding_loss: float

    @property
    def bits(self) -> int:
        return four_bit_bits(len(self.codes), self.columns, self.group)

    @property
    def rounded(self) -> tuple[int, int]:
        return len(self.codes), len(self.codes)

    @property
    def values(self) -> Tensor:
        """The weight (m, n) that the codes stand for."""
        return restore_groups(self.codes, self.scale, self.columns, self.group)

    def module(self, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, nn.Linear)
        like, biased = layer.weight, layer.bias is not None
        m, n = like.shape
        new = FourBitLinear(n, m, self.group, biased, like.device, like.dtype)
        new.weight.copy_(self.codes)
        new.scale.copy_(self.scale)
        return new.replacing(layer)


def _squared_error(site: Site, stored: Tensor) -> Tensor:
    error = stored.to(site.weight.device) - site.weight.detach()
    return error.float().square().sum(1)


def _four_bit(site: Site, group: int) -> StoredFourBit:
    (matrix,) = site.matrices().values()
    n = matrix.values.shape[1]
    codes, scale = quantize_groups(matrix.values, group, site.name)
    error = restore_groups(codes, scale, n, group).to(matrix.values) - matrix.values
    loss = float(second_order(matrix, error, by_output=True).sum())
    return StoredFourBit(codes, scale, n, group, loss)


def _all_int8(site: Site, dtype: torch.dtype) -> StoredRows:
    everything = torch.ones(len(site.weight), dtype=torch.bool)
    return store_site(site, {"weight": everything}, {"weight": True}, dtype)


def _some_in_sixteen(
    sites: Mapping[str, Site],
    eight: Mapping[str, StoredRows],
    limit: int,
    dtype: torch.dtype,
) -> dict[str, Stored]:
    scored = {}
    for name, stored in eight.items():
        decoded = restore(stored.rows["weight"], stored.layouts["weight"])
        error = _squared_error(sites[name], decoded)
        scored[name] = ScoredRows(decoded.shape[1], error)
    int8 = choose_int8(scored, limit)
    return {
        name: store_site(site, {"weight": int8[name]}, {"weight": True}, dtype)
        for name, site in sites.items()
    }


def _some_in_eight(
    sites: Mapping[str, Site],
    four: Mapping[str, StoredFourBit],
    eight: Mapping[str, StoredRows],
    limit: int,
) -> dict[str, Stored]:
    stored: dict[str, Stored] = dict(four)
    free = limit - sum(found.bits for found in four.values())

    def gain_per_bit(name: str) -> float:
        error = _squared_error(sites[name], four[name].values).sum()
        return float(error) / (eight[name].bits - four[name].bits)

    for name in sorted(sites, key=gain_per_bit, reverse=True):
        extra = eight[name].bits - four[name].bits
        if extra <= free:
            stored[name] = eight[name]
            free -= extra
    return stored
