"""SVD-LLM's update of the factors by low-rank adapters (2403.07378)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iosvd.correction.adapters import FACTORS, Training, Updated, as_two_layers
from iosvd.correction.base import Corrected, Correction, Given
from iosvd.layers.replacement import replace_


@dataclass(frozen=True)
class Lora(Correction):
    """Train adapters of the left factors, right ones fixed; merge; then the other way round.

    Rank, learning rate and epochs are the paper's (METHODS 7). It trains on Alpaca; here it is the
    calibration set, so that every method sees the same text. Merged, the factors have the ranks
    that they had.
    """

    rank: int = 8
    alpha: float = 16.0  # Adapters are scaled by alpha / rank.
    learning_rate: float = 1e-4
    epochs: int = 2
    batch_windows: int = 8  # Per step.
    seed: int = 0  # Of the adapters and of the order of the windows.

    def __post_init__(self) -> None:
        self._training()

    def __call__(self, given: Given) -> Corrected:
        replace_(given.model, given.sites)
        training = self._training()
        with torch.random.fork_rng(), as_two_layers(given.model) as pairs:
            torch.manual_seed(self.seed)
            for factor in FACTORS:
                layers = [f"{name}.{factor}" for name in pairs]
                training.train_and_merge(
                    model=given.model,
                    layers=layers,
                    tokens=given.tokens,
                    loss=next_token_loss,
                    batch_size=given.batch_size,
                    memory=given.memory,
                )
        return Corrected(Updated(given.sites, given.model), given.sites.ranks)

    def _training(self) -> Training:
        return Training(
            rank=self.rank,
            alpha=self.alpha,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_windows=self.batch_windows,
        )


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of the next token, nats, of windows (windows, length)."""
    loss: Tensor = model(input_ids=windows, labels=windows, use_cache=False).loss
    return loss
