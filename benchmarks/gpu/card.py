"""The ceilings of a card, and what one factorisation takes there and on its host."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.setting import Setting, Table
from iosvd import grams

_LONGEST_SECONDS = 20.0  # Of a single factorisation; longer ones are estimated.


def bytes_per_second(setting: Setting) -> float:
    """Return the rate of a device-to-device copy, bytes read and written."""
    count = 2**30 if setting.cuda else 2**25
    source = torch.empty(count, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * count / setting.seconds(lambda: target.copy_(source))


def multiplications_per_second(setting: Setting, dtype: torch.dtype, tf32: bool = False) -> float:
    """Return the rate of a square matrix product."""
    width = (8192 if dtype.itemsize <= 4 else 4096) if setting.cuda else 512
    a = torch.randn(width, width, device=setting.device).to(dtype)
    b = torch.randn(width, width, device=setting.device).to(dtype)
    with grams.tf32(tf32):
        return width**3 / setting.seconds(lambda: a @ b)


def ceilings(setting: Setting) -> list[Table]:
    """Measure the card: copies and products."""
    rows = [{"what": "copy", "rate": f"{bytes_per_second(setting) / 1e9:.0f} GB/s"}]
    kinds = [("bf16", torch.bfloat16, False), ("fp16", torch.float16, False)]
    kinds += [("TF32", torch.float32, True)] if setting.cuda else []
    kinds += [("fp32", torch.float32, False), ("fp64", torch.float64, False)]
    for name, dtype, tf32 in kinds:
        rate = multiplications_per_second(setting, dtype, tf32)
        rows.append({"what": f"product, {name}", "rate": f"{2 * rate / 1e12:.2f} TFLOP/s"})
    return [Table("Ceilings", rows, "Copies count bytes read and written.")]


def _eigh(matrix: Tensor) -> object:
    return torch.linalg.eigh(matrix)


def _svd(matrix: Tensor) -> object:
    return torch.linalg.svd(matrix, full_matrices=False)


def _cholesky(matrix: Tensor) -> object:
    return torch.linalg.cholesky(matrix)


KINDS: tuple[tuple[str, Callable[[Tensor], object], torch.dtype], ...] = (
    ("eigh, fp64", _eigh, torch.float64),
    ("eigh, fp32", _eigh, torch.float32),
    ("svd, fp64", _svd, torch.float64),
    ("svd, fp32", _svd, torch.float32),
    ("cholesky, fp64", _cholesky, torch.float64),
)


def factorizations(setting: Setting) -> list[Table]:
    """Measure one factorisation of the widths of the model's layers, there and on the host."""
    widths = sorted({setting.size.hidden, setting.size.inner})
    places = dict.fromkeys([setting.device, torch.device("cpu")])
    rows = []
    for name, factorize, dtype in KINDS:
        for device in places:
            for width in widths:
                head = {"factorisation": name, "on": device.type, "width": str(width)}
                once = partial(_timed, setting, factorize, dtype, device, width)
                rows.append(setting.row(head, 2.0, once))
    notes = "Seconds of one matrix; ~ is an estimate, by the cube of the width, from the one named."
    return [Table("One factorisation", rows, notes)]


def _timed(
    setting: Setting,
    factorize: Callable[[Tensor], object],
    dtype: torch.dtype,
    device: torch.device,
    width: int,
) -> dict[str, str]:
    """Measure wider and wider matrices, as far as there is time."""
    longest, seconds, measured = min(_LONGEST_SECONDS, setting.left), 0.0, 0
    _once(setting, factorize, _metric(32, dtype, device))  # Warm-up.
    for part in (8, 4, 2, 1):
        if 8 * seconds > longest:
            break
        measured = width // part
        seconds = _once(setting, factorize, _metric(measured, dtype, device))
    if measured == width:
        return {"seconds": f"{seconds:.3f}"}
    guess = seconds * (width / measured) ** 3
    return {"seconds": f"~{guess:.0f} (from {measured})"}


def _metric(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    rows = torch.randn(width, width, device=device, dtype=dtype)
    return rows @ rows.T / width + 0.1 * torch.eye(width, device=device, dtype=dtype)


def _once(setting: Setting, factorize: Callable[[Tensor], object], matrix: Tensor) -> float:
    setting.synchronize()
    started = time.perf_counter()
    factorize(matrix)
    setting.synchronize()
    return time.perf_counter() - started
