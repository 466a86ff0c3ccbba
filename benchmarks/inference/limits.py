"""Measured limits of a device (bytes and operations per second), and the cost of a call in both."""

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

_BYTES = 2**28  # Of the matrix that is read; 2 GiB on a GPU.
_SIZE = 2048  # Of the matrices that are multiplied; 8192 on a GPU.
_CALLS = {"cpu": 1, "cuda": 20}  # Between two looks at the clock, so that launches do not count.
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


def measured_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measure a matrix-vector product that waits for memory, and a square product that does not."""
    width, larger = 4096, device.type == "cuda"
    size, total = (4 * _SIZE, 8 * _BYTES) if larger else (_SIZE, _BYTES)
    rows = total // width // torch.empty(0, dtype=dtype).element_size()
    matrix = torch.ones(rows, width, device=device, dtype=dtype)
    vector = torch.ones(width, device=device, dtype=dtype)
    reading = total / _fastest(lambda: matrix @ vector, device)
    square = torch.ones(size, size, device=device, dtype=dtype)
    computing = 2 * size**3 / _fastest(lambda: square @ square, device)
    return DeviceLimits(reading, computing)


def call_cost(model: nn.Module, batch: int, new: int, cached: int) -> StepCost:
    """Return the cost of `new` tokens of each row, which see `cached` tokens on average.

    Every weight is read once, except embeddings that no head shares; the cache is read once. The
    head computes logits of one token, as generation asks for. With several new tokens, latents are
    rebuilt once for all of them.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embeddings.weight
    apart = 0 if tied else embeddings.weight.numel() * embeddings.weight.element_size()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    per_token = sum(map(_linear_operations, layers))
    operations = new * per_token + (0 if head is None else _linear_operations(head))
    entries = 0
    for attention in attentions(model).values():
        keys, values, scored, rebuilt = _attention_cost(attention, step=new == 1)
        entries += keys + values
        operations += cached * (new * scored + rebuilt)
    read = weight_bytes(model) - apart
    read += batch * cached * entries * embeddings.weight.element_size()
    return StepCost(read, batch * operations)


def _attention_cost(attention: nn.Module, step: bool) -> tuple[int, int, int, int]:
    """Return entries of keys and of values that are cached for a token, and operations on it.

    The third is for each query token, the fourth once: a step attends to latents of V and rebuilds
    K; with more query tokens both are rebuilt, and attention is the usual one.
    """
    known: Any = attention
    head, queries = int(known.head_dim), int(known.q_proj.out_features)
    full = int(known.k_proj.out_features)
    keys = values = full
    scored, rebuilt = 4 * queries, 0  # Scores and the sum of values, for every head.
    if isinstance(attention, GenerationAttention):
        keys, values = attention.cache_entries
        rebuilt += 2 * keys * full if attention.latent_k else 0
        if attention.latent_v and step:
            scored += 2 * (queries // head) * values - 2 * queries
        elif attention.latent_v:
            rebuilt += 2 * values * full
    return keys, values, scored, rebuilt


def _linear_operations(layer: nn.Linear) -> int:
    if isinstance(layer, LowRankLinear):
        return 2 * layer.rank * (layer.in_features + layer.out_features)
    if isinstance(layer, StoredLinear):
        return 2 * layer.in_features * layer.out_features
    return 2 * layer.weight.numel()


def _fastest(compute: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds of a call, in the fastest of many groups."""
    calls, best, started = _CALLS.get(device.type, 1), float("inf"), time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        for _ in range(calls):
            compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - before) / calls)
    return best
