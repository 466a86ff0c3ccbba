"""Seconds and memory of prefill and of single steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from iosvd.inference.cache import held_bytes
from iosvd.inference.memory import weight_bytes
from iosvd.system.machine import release_memory, taken_bytes
from iosvd.system.timing import measured

_WARM = 2  # Steps that are not timed.


@dataclass(frozen=True)
class Workload:
    """Batch size, prompt length and number of new tokens."""

    batch: int
    prompt: int  # Tokens.
    new: int  # Tokens.

    @property
    def length(self) -> int:
        """Length of the cache, including the warm-up steps."""
        return self.prompt + _WARM + self.new


@dataclass(frozen=True)
class Timed:
    """One generation."""

    prefill: float  # Seconds.
    steps: tuple[float, ...]  # Seconds.
    cache_bytes: int
    peak_bytes: int  # Weights, cache and everything else.


@torch.inference_mode()
def generation(model: PreTrainedModel, load: Workload, compiled: bool) -> Timed:
    """Prefill a static cache with random tokens and take one step after the other.

    Args:
        model: on its device.
        load: what is generated.
        compiled: compile the step, with CUDA graphs on a GPU.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (load.batch, load.prompt), generator=generator)
    prompt = prompt.to(device)
    step: Callable[..., Any] = model.forward
    if compiled:
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    model(input_ids=prompt[:, :8], logits_to_keep=1)  # Warm-up: libraries load, memory is mapped.
    release_memory()
    with _peak(device, weight_bytes(model)) as peak:
        cache = StaticCache(config=model.config, max_cache_len=load.length)
        first, prefill = _timed(
            device, lambda: model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        )
        token, steps = first.logits[:, -1:].argmax(-1), []
        for place in range(load.prompt, load.length):
            where = torch.full((load.batch, 1), place, device=device)
            token, seconds = _timed(device, partial(_next, step, cache, token, where))
            steps.append(seconds)
    return Timed(prefill, tuple(steps[_WARM:]), held_bytes(cache), peak())


def _next(step: Callable[..., Any], cache: StaticCache, token: Tensor, place: Tensor) -> Tensor:
    found: Tensor = step(input_ids=token, past_key_values=cache, position_ids=place).logits
    return found.argmax(-1).clone()


def _timed(device: torch.device, compute: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and its seconds, by the device's own events on a GPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        return compute(), time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = compute()
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end) / 1e3


@contextmanager
def _peak(device: torch.device, weights: int) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the growth during the block plus one model's weights.

    What the device held before is taken off, since it may hold other models too.
    """
    peaks: list[int] = []
    before = taken_bytes(device)
    with measured() as took:
        yield lambda: peaks[0]
    peaks.append(max(0, took().peak_bytes - before) + weights)
