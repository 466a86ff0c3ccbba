"""The layers that replace a linear layer: two factors, or the weight in rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from iosvd.layers.rows import RowLayout, Rows, half_dtype, multiply, order_dtype, restore
from iosvd.types import Factors

if TYPE_CHECKING:
    from typing_extensions import Self


class CompressedLinear(nn.Linear):
    """A layer that replaces a linear layer and can be turned back into one.

    It is one itself, for libraries that ask (peft), but its `weight` is only a part of it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight.
        self.in_features, self.out_features = in_features, out_features
        empty_bias = torch.empty(out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(empty_bias) if bias else None  # type: ignore[assignment]
        self.added_bias = False  # Whether the replaced layer has no bias.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the layer but keep the dtype of scales, which bfloat16 would round."""
        buffers = self.named_buffers(recurse=False)
        scales = {name: tensor for name, tensor in buffers if name.endswith("scale")}
        super()._apply(fn, recurse)
        for name, tensor in scales.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(moved.device))
        return self

    def replacing(self, layer: nn.Linear | CompressedLinear) -> Self:
        """Copy bias and requires_grad of the layer it replaces."""
        if self.bias is not None and layer.bias is not None:
            with torch.no_grad():
                self.bias.copy_(layer.bias)
        self.added_bias = isinstance(layer, CompressedLinear) and layer.added_bias
        return self.requires_grad_(next(layer.parameters()).requires_grad)

    def product(self) -> Tensor:
        """Return the weight (out, in) of the equivalent dense layer."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """Return the equivalent dense layer."""
        weight = self.product()
        biased = self.bias is not None
        layer = nn.Linear(self.in_features, self.out_features, biased, weight.device, dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}"


class StoredLinear(CompressedLinear):
    """A linear layer that holds matrices: each a parameter in the model's dtype, or `Rows`.

    The matrix `left` in rows is the parameter `left` (the rows in 16 bits) and the buffers
    `left_int8`, `left_scale` and `left_order`. One matrix is always called `weight`. If anything is
    compressed its shape differs from the replaced layer's (out, in), so transformers refuses to
    load the checkpoint into a model without these layers.
    """

    layouts: Mapping[str, RowLayout]
    rank: int | None = None  # None: the weight is one matrix.

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (out, in) of every matrix by name."""
        raise NotImplementedError

    def _allocate(
        self,
        layouts: Mapping[str, RowLayout],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.layouts = dict(layouts)
        for name, shape in self.shapes.items():
            layout = layouts.get(name)
            if layout is None:
                values = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(values))
                continue
            count, width = shape if layout.by_output else shape[::-1]
            kept_dtype = half_dtype(dtype or torch.get_default_dtype())
            kept_shape, shape8 = (count - layout.int8, width), (layout.int8, width)
            if not layout.by_output:
                kept_shape, shape8 = kept_shape[::-1], shape8[::-1]
            kept = torch.empty(kept_shape, device=device, dtype=kept_dtype)
            codes = torch.empty(shape8, device=device, dtype=torch.int8)
            scale = torch.empty(layout.int8, device=device, dtype=torch.float16)
            order = torch.empty(count, device=device, dtype=order_dtype(count))
            self.register_parameter(name, nn.Parameter(kept))
            self.register_buffer(f"{name}_int8", codes)
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_order", order if layout.ordered else None)

    def rows(self, name: str) -> Rows:
        """Return the tensors of a matrix that is stored in rows."""
        parts = (getattr(self, f"{name}_{part}") for part in ("int8", "scale", "order"))
        return Rows(getattr(self, name), *parts)

    def matrix(self, name: str) -> Tensor:
        """Return the values of a matrix (out, in), in float32 or better."""
        if name in self.layouts:
            return restore(self.rows(name), self.layouts[name])
        values: Tensor = getattr(self, name)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def _times(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        if name not in self.layouts:
            return linear(x, getattr(self, name), bias)
        y = multiply(x, self.rows(name), self.layouts[name])
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return super().extra_repr() + "".join(f", {n}: {kept}" for n, kept in self.layouts.items())


class LowRankLinear(StoredLinear):
    """y = left (right x) + bias, two products of rank k instead of one.

    The right factor is the matrix called `weight`, (k, in); `left` is (out, k).
    """

    rank: int
    weight: nn.Parameter
    left: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layouts: Mapping[str, RowLayout] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rank = rank
        self._allocate(layouts or {}, device, dtype)

    @classmethod
    def from_factors(cls, layer: nn.Linear, factors: Factors) -> LowRankLinear:
        """Return the low-rank form of a dense layer, with its dtype and bias."""
        like, biased = layer.weight, layer.bias is not None
        m, n = like.shape
        new = cls(n, m, factors.rank, biased, like.device, like.dtype)
        new.weight = _holding(new.weight, factors.right)
        new.left = _holding(new.left, factors.left)
        return new.replacing(layer)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.rank, self.in_features), "left": (self.out_features, self.rank)}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def down(self, x: Tensor) -> Tensor:
        """Return the latent right x (…, k) of inputs (…, in)."""
        return self._times(x, "weight")

    def up(self, latent: Tensor) -> Tensor:
        """Return left z + bias (…, out) of latents (…, k)."""
        return self._times(latent, "left", self.bias)

    def product(self) -> Tensor:
        return self.matrix("left") @ self.matrix("weight")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def _holding(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Return a parameter with these values; they are copied only where they have to be."""
    fits = values.dtype == parameter.dtype and values.device == parameter.device
    if fits and values.is_contiguous():
        # With the strides that loading gives: those of a dimension of size 1 are free, and products
        # round by them.
        return nn.Parameter(values.detach().reshape(-1).view(values.shape))
    with torch.no_grad():
        parameter.copy_(values)
    return parameter


class RowLinear(StoredLinear):
    """y = W x + bias with the whole weight W stored in rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layouts: Mapping[str, RowLayout],
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._allocate(layouts, device, dtype)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.out_features, self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        return self._times(x, "weight", self.bias)

    def product(self) -> Tensor:
        return self.matrix("weight")


def empty_layer(
    in_features: int,
    out_features: int,
    rank: int | None,
    layouts: Mapping[str, RowLayout],
    *,
    biased: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> LowRankLinear | RowLinear:
    """Return an uninitialised layer of two factors, or (rank None) of a weight in rows."""
    if rank is None:
        return RowLinear(in_features, out_features, biased, device, dtype, layouts=layouts)
    return LowRankLinear(in_features, out_features, rank, biased, device, dtype, layouts)
