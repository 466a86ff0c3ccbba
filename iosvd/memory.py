"""How much memory there is, and what a pass of statistics takes of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from iosvd.budget import Shape
from iosvd.types import Needs

GIB = 2**30
SPARE = 0.1  # Of what is free: allocators and libraries take some too.
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class MemoryUse:
    """How statistics share the memory; it changes their values by rounding only."""

    limit_bytes: float = math.inf  # Of the sums of one pass over the calibration set.
    metrics_on_cpu: bool = False  # The sums are in main memory, wherever the model is.
    checkpoint_blocks: bool = (
        False  # Activations of one decoder block at a time, and a forward more.
    )


@dataclass(frozen=True)
class Activations:
    """What one batch of windows takes beside weights and sums, in bytes, by shapes alone.

    Counted for blocks of linear layers whose weights ask for no gradient: the output of every
    layer, the activation function's result, both norms in float32, and for a weight's gradient
    each layer's input; logits and what the cotangents are made of. Measured within 10 % of the
    whole peak (make bench), of which it is the smaller part.
    """

    shapes: tuple[tuple[Shape, ...], ...]  # Of the linear layers, by decoder block.
    hidden: int
    vocabulary: int
    tokens: int  # Of a batch.
    entry_bytes: int  # Of the model's dtype.

    def bytes(self, needs: Needs, checkpoint_blocks: bool) -> int:
        """Return the bytes at the most crowded moment of a forward and backward pass."""
        blocks = [self._block(shapes, needs) for shapes in self.shapes]
        logits = self.tokens * self.vocabulary
        if not needs.backward:
            return max(blocks) + logits * self.entry_bytes
        kept = sum(blocks)
        if checkpoint_blocks:
            kept = len(blocks) * self.tokens * self.hidden * self.entry_bytes + max(blocks)
        # Logits and their gradient in the model's dtype, probabilities or the like in float32.
        return kept + logits * (2 * self.entry_bytes + 4 * (2 + needs.true_loss))

    def _block(self, shapes: Iterable[Shape], needs: Needs) -> int:
        shapes = list(shapes)
        per_token = sum(shape.m for shape in shapes) + max(shape.m for shape in shapes)
        if needs.gradient_windows or needs.every_gradient:
            per_token += sum({shape.n for shape in shapes}) + self.hidden
        return self.tokens * (per_token * self.entry_bytes + 2 * 4 * self.hidden)


def free_bytes(device: torch.device) -> int:
    """Return what is free on a device: of a GPU, or of main memory as far as the system lets us."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    free = psutil.virtual_memory().available
    if _CGROUP.exists() and (limit := _CGROUP.read_text().strip()) != "max":
        free = min(free, int(limit) - resident_bytes())
    return int(free)


def taken_bytes(device: torch.device) -> int:
    """Return what this process has of a device's memory already."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def resident_bytes() -> int:
    """Return the main memory of this process."""
    return int(psutil.Process().memory_info().rss)


def sums_limit(
    memory_gib: float | None,
    devices: Collection[torch.device],
    beside: int,
    workers: int = 1,
) -> float:
    """Return how many bytes the sums of a pass may take.

    Args:
        memory_gib: that this process may take of the devices' memory; None: what is free.
        devices: where the sums are kept.
        beside: bytes that are still to be taken there: by activations, or weights.
        workers: processes that share main memory alike.
    """
    if memory_gib is not None:
        return memory_gib * GIB - sum(map(taken_bytes, devices)) - beside
    free = sum(free_bytes(d) / (1 if d.type == "cuda" else workers) for d in devices)
    return (1 - SPARE) * free - beside
