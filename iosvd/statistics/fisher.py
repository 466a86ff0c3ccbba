"""The Fisher metric of a site's output: E[g gᵀ], g = ∂ℓ/∂y of the next-token loss (METHODS 2.3).

With labels drawn from the model's own predictions its expectation is the KL metric of the whole
vocabulary; with the true labels it is the empirical Fisher.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from iosvd.statistics.output_tokens import OutputTokens


class Labels(Enum):
    """Labels of the loss: the text's next tokens, or draws from the model's predictions."""

    text = "text"
    sampled = "sampled"


@dataclass(frozen=True)
class FisherMetric:
    """Options of the Fisher metric."""

    labels: Labels = Labels.text
    seed: int = 0  # Of the draws.
    tokens: OutputTokens = OutputTokens()  # noqa: RUF009 (frozen)

    @property
    def sampled(self) -> bool:
        """Whether the labels are drawn."""
        return self.labels is Labels.sampled

    def uniform(self, window: int, length: int) -> Tensor:
        """Return the uniform numbers (length, 1) that draw the labels of a calibration window.

        They depend on the window's index, not on its batch.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + window)
        return torch.rand(length, 1, generator=generator)

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Draw a token at every position, (windows, positions), from the model's predictions.

        Args:
            logits: (windows, positions, vocabulary).
            uniform: (windows, positions, 1), in [0, 1).
        """
        uniform = uniform.to(logits.device)
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        total = torch.softmax(logits.detach(), dim=-1, dtype=accumulate).cumsum(-1)
        # The sum may end slightly below one.
        drawn = torch.searchsorted(total, uniform.to(accumulate) * total[..., -1:], right=True)
        return drawn.squeeze(-1).clamp_max(logits.shape[-1] - 1)
