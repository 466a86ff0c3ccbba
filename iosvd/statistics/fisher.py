"""The Fisher metric of a site's output: E[g gᵀ], g = ∂ℓ/∂y of the next-token loss (METHODS 2.3).

With labels drawn from the model's own predictions its expectation is the KL metric of the whole
vocabulary; with the true labels it is the empirical Fisher.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Labels(Enum):
    """Labels of the loss: the text's next tokens, or draws from the model's predictions."""

    text = "text"
    sampled = "sampled"


@dataclass(frozen=True)
class FisherMetric:
    """Options of the Fisher metric."""

    labels: Labels = Labels.text
    seed: int = 0  # Of the draws.

    @property
    def sampled(self) -> bool:
        """Whether the labels are drawn."""
        return self.labels is Labels.sampled

    def draw(self, logits: Tensor, first_window: int) -> Tensor:
        """Draw a token at every position, (windows, length), from logits (…, vocabulary).

        The draws depend on a window's index, not on the batch that it came in.
        """
        windows, length, vocabulary = logits.shape
        uniform = torch.stack(
            [
                torch.rand(length, 1, generator=self._generator(first_window + i))
                for i in range(windows)
            ]
        ).to(logits.device)
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        total = torch.softmax(logits.detach(), dim=-1, dtype=accumulate).cumsum(-1)
        # The sum may end a hair below one.
        drawn = torch.searchsorted(total, uniform.to(accumulate) * total[..., -1:], right=True)
        return drawn.squeeze(-1).clamp_max(vocabulary - 1)

    def _generator(self, window: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + window)
