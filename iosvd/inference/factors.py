"""The left factors of k_proj and v_proj, head by head (METHODS 8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from iosvd.layers.modules import LowRankLinear


class HeadFactor:
    """The left factor (heads · D, k) of a projection, one matrix (D, k) per head, and its bias.

    A view of the factor; of one in int8 rows, a copy in the model's dtype.
    """

    def __init__(self, layer: LowRankLinear, heads: int, dtype: torch.dtype) -> None:
        left = layer.matrix("left").to(dtype) if "left" in layer.layouts else layer.left.detach()
        self.left = left.unflatten(0, (heads, -1))  # (heads, D, k)
        bias = layer.bias
        self.bias = None if bias is None else bias.detach().unflatten(0, (heads, 1, -1))

    def up(self, latents: Tensor) -> Tensor:
        """Return the heads' features (heads, rows, D) of latents (rows, k) or (heads, rows, k)."""
        features = latents.expand(len(self.left), -1, -1).bmm(self.left.transpose(1, 2))
        return features if self.bias is None else features + self.bias


@dataclass(frozen=True)
class FoldedFactor:
    """o_proj's right factor times U_v (k_o, heads · k), and its bias (k_o,)."""

    product: Tensor
    bias: Tensor | None

    def __call__(self, latents: Tensor) -> Tensor:
        """Return o_proj's latents (…, k_o) from those of all heads (…, heads · k)."""
        return linear(latents, self.product, self.bias)


def folded_right(output: nn.Linear, values: HeadFactor, group: int) -> FoldedFactor | None:
    """Return o_proj's right factor times U_v.

    None where the two apart have fewer entries, or o_proj has no right factor in the model's dtype.
    The product stands beside both: a step reads less, a model holds more.

    Args:
        output: o_proj.
        values: U_v, one matrix per head of values.
        group: heads of queries that share one.
    """
    if not isinstance(output, LowRankLinear) or "weight" in output.layouts:
        return None
    kv_heads, width, rank = values.left.shape
    heads = kv_heads * group
    apart = values.left.numel() + output.rank * heads * width
    if output.rank * heads * rank >= apart:
        return None
    right = output.weight.detach().unflatten(1, (kv_heads, group, width))
    with torch.no_grad():
        product = torch.einsum("okgd,kdr->okgr", right, values.left).flatten(1).contiguous()
        bias = None
        if values.bias is not None:
            bias = torch.einsum("okgd,kd->o", right, values.bias[:, 0])
    return FoldedFactor(product, bias)
