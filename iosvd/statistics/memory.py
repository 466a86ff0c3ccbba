"""Memory limits, and the memory that a pass of statistics takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from iosvd.budget import Shape
from iosvd.statistics.needs import Needs
from iosvd.system.machine import GIB, free_bytes, taken_bytes

CHUNK_ENTRIES = 2**24  # Logits that are computed at a time, where the head can be separated.
SPARE = 0.1  # Share of free memory left to allocators and libraries.


@dataclass(frozen=True)
class MemoryUse:
    """Memory limits of the statistics; they change values only by rounding."""

    limit_bytes: float = math.inf  # Of the sums of one pass over the calibration set.
    metrics_on_cpu: bool = False  # Keep the sums in main memory, wherever the model is.
    # While adapters are trained: activations of one block at a time, for one more forward pass.
    checkpoint_blocks: bool = False


@dataclass(frozen=True)
class Activations:
    """Memory of one batch of windows besides weights and sums, in bytes, from shapes alone.

    Counted for blocks of linear layers whose weights ask for no gradient, of which one at a time
    has a graph: the output of every layer, the activation function's result, both norms in
    float32, the cotangents of the widest layers, and for a weight's gradient each layer's input;
    the input of every block; logits and what the cotangents are made of; what is cast to float32
    for the sums. Measured within 10 % of the whole peak (make bench), of which it is the smaller
    part.
    """

    shapes: tuple[tuple[Shape, ...], ...]  # Of the linear layers, by decoder block.
    hidden: int
    vocabulary: int
    tokens: int  # Of a batch.
    entry_bytes: int  # Of the model's dtype.
    separate_head: bool = True  # Whether a few logits can be computed at a time.

    def bytes(self, needs: Needs, *, chained: bool = True) -> int:
        """Return the peak bytes of a forward and backward pass.

        Args:
            needs: what is collected.
            chained: whether blocks keep no graph (models/chain.py).
        """
        blocks = [self._block(shapes, needs) for shapes in self.shapes]
        block = max(blocks) if chained else sum(blocks)
        logits = self.tokens * self.vocabulary
        if self.separate_head:
            logits = min(logits, CHUNK_ENTRIES)
        if not needs.backward:
            return block + logits * self.entry_bytes
        # The input of each block, and the gradient of the hidden states in each backward pass.
        states = len(self.shapes) + 1 + self._phases(needs)
        kept = states * self.tokens * self.hidden * self.entry_bytes
        if not self.separate_head:
            kept += logits * self.entry_bytes
        # Logits and their gradient in the model's dtype, probabilities or the like in float32.
        head = logits * (2 * self.entry_bytes + 4 * (2 + needs.true_loss))
        return kept + max(block, head)  # One after the other.

    def _phases(self, needs: Needs) -> int:
        """Return the number of backward passes of a batch."""
        kl, fisher = needs.kl_metric, needs.fisher_metric
        passes = 0 if kl is None else kl.passes(self.vocabulary)
        return passes + (fisher is not None and fisher.sampled) + needs.true_loss

    def _block(self, shapes: Iterable[Shape], needs: Needs) -> int:
        shapes = list(shapes)
        widest = max(shape.m for shape in shapes)
        per_token = sum(shape.m for shape in shapes) + widest
        if needs.backward:
            per_token += 2 * widest
        if needs.gradient_windows or needs.every_gradient:
            per_token += sum({shape.n for shape in shapes}) + self.hidden
        cast = 4 * widest if self.entry_bytes < 4 else 0
        return self.tokens * (per_token * self.entry_bytes + 2 * 4 * self.hidden + cast)


def sums_limit(
    memory_gib: float | None,
    devices: Collection[torch.device],
    beside: int,
    workers: int = 1,
) -> float:
    """Return the bytes that the sums of a pass may take.

    Args:
        memory_gib: limit of this process on the devices; None: what is free.
        devices: hold the sums.
        beside: bytes that activations or weights will still take there.
        workers: processes that share main memory equally.
    """
    if memory_gib is not None:
        return memory_gib * GIB - sum(map(taken_bytes, devices)) - beside
    free = sum(free_bytes(d) / (1 if d.type == "cuda" else workers) for d in devices)
    return (1 - SPARE) * free - beside


def statistics_bytes(shapes: Mapping[str, Shape], needs: Needs, shared: Mapping[str, str]) -> int:
    """Return the bytes of the sums of these sites, in float32.

    Args:
        shapes: of the sites' weights.
        needs: what is collected.
        shared: the result of `shared_inputs`, of these sites or more.
    """
    entries = 0
    readers: set[str] = set()
    for name, shape in shapes.items():
        m, n = shape.m, shape.n
        if shared[name] not in readers:  # Sites that read the same tensor share one sum.
            readers.add(shared[name])
            entries += n * n * needs.input_metric + n * needs.input_magnitude
        entries += m * m * ((needs.kl_metric is not None) + (needs.fisher_metric is not None))
        entries += m * needs.fisher_rows + m * n * needs.fisher_elements
        entries += m * n * (needs.gradient_windows > 0)
        # Both factors, and the sum of the one that is being updated.
        entries += (m * m + n * n + max(m, n) ** 2) * (needs.kronecker_passes > 0)
    return 4 * entries


def groups_within(
    shapes: Mapping[str, Shape], needs: Needs, shared: Mapping[str, str], limit_bytes: float
) -> list[list[str]]:
    """Divide sites, in order, so that the sums of each group are within a limit."""

    def size(group: list[str]) -> int:
        return statistics_bytes({name: shapes[name] for name in group}, needs, shared)

    return in_groups(shapes, size, limit_bytes)


def in_groups(
    sites: Iterable[str], size_bytes: Callable[[list[str]], int], limit_bytes: float
) -> list[list[str]]:
    """Divide sites, in order, into as few groups as a limit allows, with at least one site each.

    Args:
        sites: qualified names.
        size_bytes: of a group.
        limit_bytes: of every group.
    """
    groups: list[list[str]] = []
    for site in sites:
        if groups and size_bytes([*groups[-1], site]) <= limit_bytes:
            groups[-1].append(site)
        else:
            groups.append([site])
    return groups
