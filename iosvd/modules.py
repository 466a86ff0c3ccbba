"""The layer that takes a linear layer's place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from iosvd.types import Factors


class LowRankLinear(nn.Module):
    """y = left (right x) + bias, two products of rank k instead of one.

    The right factor is called `weight`: its shape (k, in) is never the (out, in) of the layer it
    replaces, so transformers refuses to load the checkpoint into a model without these layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.left = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        empty_bias = torch.empty(out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(empty_bias) if bias else None

    @classmethod
    def like(cls, layer: nn.Linear, rank: int) -> LowRankLinear:
        """Return an uninitialised layer with the shape, bias, dtype and device of a dense one."""
        device, dtype = layer.weight.device, layer.weight.dtype
        bias = layer.bias is not None
        return cls(layer.in_features, layer.out_features, rank, bias, device, dtype)

    @classmethod
    def from_factors(cls, layer: nn.Linear, factors: Factors) -> LowRankLinear:
        """Return the low-rank form of a dense layer, whose bias it takes over."""
        new = cls.like(layer, factors.rank)
        with torch.no_grad():
            new.weight.copy_(factors.right)
            new.left.copy_(factors.left)
            if new.bias is not None:
                new.bias.copy_(layer.bias)
        return new.requires_grad_(layer.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.weight), self.left, self.bias)

    def dense(self) -> nn.Linear:
        """Return the equivalent dense layer; the product is taken in float32 or better."""
        dtype, device = self.weight.dtype, self.weight.device
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device, dtype)
        accumulate = torch.promote_types(dtype, torch.float32)
        with torch.no_grad():
            layer.weight.copy_(self.left.to(accumulate) @ self.weight.to(accumulate))
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, rank={self.rank}, bias={self.bias is not None}"
