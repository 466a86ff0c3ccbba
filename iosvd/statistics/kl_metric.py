"""The output metric of IO-SVD: curvature of KL(p ‖ q) in the top-K logits (METHODS 2.2).

The Hessian of the KL divergence at q = p is H = diag(p) − p pᵀ. Restricted to the K most probable
tokens it has the square root

    B = diag(s) − a p sᵀ,   s = √p,   P = Σ p,   a = (1 − √(1−P)) / P,

so B ε with random signs ε, back-propagated to an output y, has the second moment Jᵀ H J there.
Nothing of the size vocabulary × vocabulary is formed, and K may be the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from iosvd.statistics.output_tokens import OutputTokens


class Estimator(Enum):
    """Estimators of C: one backward pass per probe, or one per top-K token."""

    probe = "probe"
    exact = "exact"


@dataclass(frozen=True)
class KLMetric:
    """Options of the KL metric. top_k = 0 is the whole vocabulary.

    The paper does not say whether it renormalises the K probabilities; the default here does not.
    """

    top_k: int = 5
    renormalize: bool = False
    estimator: Estimator = Estimator.probe
    probes: int = 1  # Backward passes of the probe estimator.
    seed: int = 0
    tokens: OutputTokens = OutputTokens()  # noqa: RUF009 (frozen)

    @property
    def estimates(self) -> int:
        """Number of estimates of C that the backward passes sum.

        Each probe is one; the K passes of the exact estimator together are one.
        """
        return self.probes if self.estimator is Estimator.probe else 1

    def columns(self, vocabulary: int) -> int:
        """Return K: the number of tokens whose logits count at a position."""
        return min(self.top_k or vocabulary, vocabulary)

    def passes(self, vocabulary: int) -> int:
        """Return the number of backward passes of a batch."""
        return self.probes if self.estimator is Estimator.probe else self.columns(vocabulary)

    def signs(self, window: int, length: int, columns: int) -> Tensor:
        """Return random signs (passes, length, columns) of one calibration window.

        They depend on the window's index, not on its batch.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + window)
        passes = self.probes if self.estimator is Estimator.probe else columns
        shape = (passes, length, columns if self.estimator is Estimator.probe else 1)
        # In a byte each: those of a whole vocabulary are many.
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1


def top_k_probabilities(
    logits: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the K largest probabilities (..., K), and their tokens (None: the vocabulary)."""
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    p = torch.softmax(logits.detach(), dim=-1, dtype=accumulate)
    if top_k == 0 or top_k >= logits.shape[-1]:
        return p, None
    p, index = p.topk(top_k, dim=-1)
    return (p / p.sum(-1, keepdim=True) if renormalize else p), index


def root_times(p: Tensor, vectors: Tensor, complete: bool) -> Tensor:
    """Return B e for probabilities p and vectors e, both of shape (..., K).

    Args:
        complete: whether p sums to one; then a = 1, where rounding in 1 − P would be seen.
    """
    s = p.sqrt()
    total = p.sum(-1, keepdim=True)
    a = 1.0 if complete else (1 - (1 - total).clamp_min(0).sqrt()) / total
    return s * vectors - a * p * (s * vectors).sum(-1, keepdim=True)


def cotangents(logits: Tensor, metric: KLMetric, signs: Tensor) -> Iterator[Tensor]:
    """Yield, per backward pass, a scalar whose gradient in the logits is the pass's cotangent.

    Args:
        logits: (windows, positions, vocabulary), attached to the graph.
        metric: which metric is estimated.
        signs: (passes, windows, positions, columns), as `KLMetric.signs` returns them.
    """
    p, index = top_k_probabilities(logits, metric.top_k, metric.renormalize)
    chosen = logits if index is None else logits.gather(-1, index)
    complete = index is None or metric.renormalize
    for number, sign in enumerate(signs):
        sign = sign.to(p)
        if metric.estimator is Estimator.probe:
            vectors = sign
        else:  # Column B e_k at every position, times the position's own sign.
            vectors = torch.zeros_like(p)
            vectors[..., number] = sign[..., 0]
        yield (chosen * root_times(p, vectors, complete).to(chosen.dtype)).sum()
