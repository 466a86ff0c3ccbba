"""Measured limits of a device (bytes and operations per second), and what a step needs of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iosvd.inference.attention import GenerationAttention
from iosvd.inference.memory import weight_bytes
from iosvd.inference.structure import attentions
from iosvd.layers.modules import LowRankLinear, StoredLinear

_BYTES = 2**28  # Of the matrix that is read.
_SIZE = 2048  # Of the matrices that are multiplied.
_SECONDS = 0.5


@dataclass(frozen=True)
class DeviceLimits:
    """Memory bandwidth and arithmetic rate, measured on the device."""

    bytes_per_second: float
    operations_per_second: float  # A multiplication and an addition are two.

    def seconds(self, needs: StepCost) -> float:
        """Return the least seconds that a call may take."""
        return max(
            needs.bytes / self.bytes_per_second, needs.operations / self.operations_per_second
        )


@dataclass(frozen=True)
class StepCost:
    """Bytes that a call must read and operations that it must do."""

    bytes: float
    operations: float


def measured_ceiling(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measure a matrix-vector product that waits for memory, and a square product that does not."""
    width = 4096
    rows = _BYTES // width // torch.empty(0, dtype=dtype).element_size()
    matrix = torch.ones(rows, width, device=device, dtype=dtype)
    vector = torch.ones(width, device=device, dtype=dtype)
    reading = _BYTES / _fastest(lambda: matrix @ vector, device)
    square = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
    computing = 2 * _SIZE**3 / _fastest(lambda: square @ square, device)
    return DeviceLimits(reading, computing)


def step_needs(model: nn.Module, batch: int, held: int) -> StepCost:
    """Return what one decoding step of a batch needs, with `held` tokens of each row in the cache.

    Every weight is read once, except embeddings that no head shares; the cache is read once.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embeddings.weight
    apart = 0 if tied else embeddings.weight.numel() * embeddings.weight.element_size()
    per_token = sum(_linear_operations(m) for m in model.modules() if isinstance(m, nn.Linear))
    found, cached = attentions(model).values(), 0
    for attention in found:
        keys, values, operations = _attention_needs(attention)
        cached += (keys + values) * embeddings.weight.element_size()
        per_token += held * operations
    read = weight_bytes(model) - apart + batch * held * cached
    return StepCost(read, batch * per_token)


def _attention_needs(attention: nn.Module) -> tuple[int, int, int]:
    """Return the entries cached for a token, of keys and of values, and operations on them."""
    known: Any = attention
    head, queries = int(known.head_dim), int(known.q_proj.out_features)
    full = int(known.k_proj.out_features)
    keys, values = full, full
    operations = 4 * queries  # Scores, and the sum of values, for every head.
    if isinstance(attention, GenerationAttention):
        keys, values = attention.cache_entries
        if attention.latent_v:
            operations += 2 * (queries // head) * values - 2 * queries
        if attention.latent_k:
            operations += 2 * keys * full
    return keys, values, operations


def _linear_operations(layer: nn.Linear) -> int:
    if isinstance(layer, LowRankLinear):
        return 2 * layer.rank * (layer.in_features + layer.out_features)
    if isinstance(layer, StoredLinear):
        return 2 * layer.in_features * layer.out_features
    return 2 * layer.weight.numel()


def _fastest(compute: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds of the fastest of many calls."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return best
