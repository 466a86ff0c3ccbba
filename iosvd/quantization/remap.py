"""Two int8 halves in the slots of 16 bits (Dobi-SVD, arXiv 2502.02723)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from iosvd.budget import ENTRY_BITS, Shape, SiteCost
from iosvd.layers.int8 import Code
from iosvd.layers.rows import SCALE_BITS
from iosvd.quantization.axis import Axis
from iosvd.quantization.base import Quantization
from iosvd.quantization.stored import store_site
from iosvd.types import Site, Stored


@dataclass(frozen=True)
class Remap(Quantization):
    """The first min(m, n) channels of both factors are int8, the rest stay in 16 bits (METHODS 6).

    A component costs max(m, n) entries, so all but the highest few ranks are smaller than the dense
    weight: the scales, which the papers do not count, take two entries per channel.
    """

    code: Code = Code.linear

    def cost(self, shape: Shape) -> SiteCost:
        return SiteCost(
            dense=ENTRY_BITS * shape.entries,
            fixed=2 * SCALE_BITS * shape.full_rank,
            component=ENTRY_BITS * max(shape.m, shape.n),
        )

    def __call__(
        self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        return {name: self._store(site, dtype) for name, site in sites.items()}

    def _store(self, site: Site, dtype: torch.dtype) -> Stored:
        m, n = site.weight.shape
        dense = site.factors is None
        shared = 0 if dense else min(m, n)
        channels = {"weight": m if dense else n, "left": m}
        names = ["weight"] if dense else ["weight", "left"]
        int8 = {name: torch.arange(channels[name]) < shared for name in names}
        by_output = {name: Axis.channel.by_output(name, dense) for name in names}
        return store_site(site, int8, by_output, dtype, self.code, first=True)
