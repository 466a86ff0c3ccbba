"""Twice the ranks, every row in int8 (ZS-SVD's HQ, arXiv 2602.02848)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from iosvd.budget import Shape, SiteCost
from iosvd.layers.int8 import Code
from iosvd.quantization.axis import Axis
from iosvd.quantization.base import Quantization
from iosvd.quantization.stored import store_site
from iosvd.types import Site, Stored


@dataclass(frozen=True)
class Half(Quantization):
    """Every row of every factor, and of every weight that stays dense, is int8 (METHODS 6).

    Ranks are planned with the cost of int8 rows, scales included: at ratio ρ that is just under
    2ρ of the parameters. Above a ratio of about 0.5 everything fits, and the budget is not used up.
    """

    axis: Axis = Axis.component
    code: Code = Code.linear

    def cost(self, shape: Shape) -> SiteCost:
        return self.axis.int8_cost(shape)

    def __call__(
        self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        stored: dict[str, Stored] = {}
        for name, site in sites.items():
            by_output, int8 = {}, {}
            for matrix, found in site.matrices().items():
                out = self.axis.by_output(matrix, site.factors is None)
                by_output[matrix] = out
                int8[matrix] = torch.ones(found.values.shape[0 if out else 1], dtype=torch.bool)
            stored[name] = store_site(site, int8, by_output, dtype, self.code)
        return stored
