"""Which tokens enter an output metric, and how much each may weigh in it (METHODS 11.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iosvd.errors import ConfigError, check_at_least
from iosvd.grams import flat, wide

_SMALLEST_NORM = 1e-10  # Of a gradient of a window's mean loss; smaller ones are left alone.


@dataclass(frozen=True)
class OutputTokens:
    """KFAC-SVD's treatment of cotangents (arXiv 2610.32878 and its public code); default: none.

    A token at the ends of a window, or one whose cotangent is far larger than the others', would
    otherwise decide much of the metric.
    """

    # The norm of a token's cotangent, relative to the mean over its window: [least, greatest].
    clip_norms: list[float] | None = None
    left_out: float = 0.0  # Share of a window's tokens, at each of its ends.

    def __post_init__(self) -> None:
        check_at_least(0, left_out=self.left_out)
        if self.left_out >= 0.5:
            raise ConfigError(
                f"left_out={self.left_out:g} leaves no token of a window, for it counts at both"
                " ends; it must be below 0.5"
            )
        if self.clip_norms is not None and not _is_range(self.clip_norms):
            raise ConfigError(
                f"clip_norms={self.clip_norms} is no range [least, greatest] around 1, the mean"
            )

    @property
    def changes(self) -> bool:
        """Whether the metric differs from the plain mean over all tokens."""
        return self.clip_norms is not None or self.left_out > 0

    def kept(self, length: int) -> range:
        """Return the positions of a window that enter the metric."""
        edge = int(self.left_out * length)
        return range(edge, length - edge)

    def count(self, length: int, predictions: int) -> int:
        """Return how many of the first `predictions` positions of a window enter the metric."""
        kept = self.kept(length)
        return min(kept.stop, predictions) - kept.start

    def rows(self, cotangents: Tensor) -> Tensor:
        """Return the cotangents that enter the metric, (tokens, m).

        The mean norm is that of the positions that are kept, as in the public code.

        Args:
            cotangents: of whole windows, (windows, length, m).
        """
        length = cotangents.shape[1]
        kept = self.kept(length)
        chosen = cotangents[:, kept.start : kept.stop]
        if self.clip_norms is not None:
            # Cotangents here are those of a window's summed loss. Scaled ones may exceed float16.
            chosen = chosen.to(wide(chosen.dtype)) * self._scale(chosen, _SMALLEST_NORM * length)
        return flat(chosen)

    def _scale(self, cotangents: Tensor, smallest: float) -> Tensor:
        """Return what each token is multiplied by, (windows, tokens, 1)."""
        assert self.clip_norms is not None
        least, greatest = self.clip_norms
        norms = torch.linalg.vector_norm(
            cotangents, dim=-1, keepdim=True, dtype=wide(cotangents.dtype)
        )
        counts = norms > smallest
        mean = (norms * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
        wanted = norms.clamp(least * mean, greatest * mean)
        return torch.where(counts, wanted / norms, torch.ones_like(norms))


def _is_range(ends: list[float]) -> bool:
    return len(ends) == 2 and 0 <= ends[0] <= 1 <= ends[1]
