"""Sums of products over tokens: Gram matrices by block rows, in float32 or better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_GRAM_BLOCKS = 4
GRAM_SHARE = 5 / 8  # Of a symmetric product's multiplications, what four block rows take.
_MIRROR_BLOCKS = 16
# Of torch 2.9. Reading the old one raises an error for those who have used the new one.
_NEW_SETTING = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def flat(x: Tensor) -> Tensor:
    """Flatten (windows, length, width) to (tokens, width)."""
    return x.reshape(-1, x.shape[-1])


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums of products: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def rows_of(x: Tensor) -> Tensor:
    """Flatten (windows, length, width) to (tokens, width), in float32 or better."""
    return flat(x).to(wide(x.dtype))


def add_lower_gram_(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to the lower triangle of `total`; `mirror_` completes it once at the end.

    In four block rows this takes 5/8 of the operations of the whole product (measured 0.64 to 0.71
    of its time for widths 192 to 2048 on one CPU thread); torch has no symmetric product.

    Args:
        total: (width, width), in float32 or better.
        rows: (tokens, width), in any type.
    """
    cast = rows.to(total.dtype)
    with tensor_cores(rows):
        for start, end in _blocks(len(total), _GRAM_BLOCKS):
            _add_product_(total[start:end, :end], cast[:, start:end], cast[:, :end])


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add aᵀ b, of any type, to a matrix in float32 or better, which may be on another device."""
    with tensor_cores(a, b):
        _add_product_(total, a.to(total.dtype), b.to(total.dtype))


@contextmanager
def tensor_cores(*factors: Tensor) -> Iterator[None]:
    """Let CUDA multiply in TF32 what was cast to float32, if that rounds no factor.

    TF32 keeps 10 bits behind the point and float32's exponents, which hold every number of both
    half-precision types; sums stay in float32. At an H100's peaks this is 7 times as fast.

    Args:
        factors: before they were cast.
    """
    if not all(x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) for x in factors):
        yield
        return
    with tf32(True):
        yield


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in CUDA's float32 products for a while."""
    setting = torch.backends.cuda.matmul
    name = "fp32_precision" if _NEW_SETTING else "allow_tf32"
    before = getattr(setting, name)
    setattr(setting, name, ("tf32" if allowed else "ieee") if _NEW_SETTING else allowed)
    try:
        yield
    finally:
        setattr(setting, name, before)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.device == a.device:
        total.addmm_(a.T, b)
    else:
        total.add_((a.T @ b).to(total.device))


def mirror_(total: Tensor) -> None:
    """Copy the lower triangle of a square matrix to the upper one, block by block in place."""
    for start, end in _blocks(len(total), _MIRROR_BLOCKS):
        square = total[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).T)
        total[start:end, end:].copy_(total[end:, start:end].T)


def _blocks(width: int, count: int) -> Iterator[tuple[int, int]]:
    step = -(-width // count)
    for start in range(0, width, step):
        yield start, min(start + step, width)
