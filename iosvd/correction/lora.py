"""SVD-LLM's update of the factors by low-rank adapters (2403.07378)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from iosvd.correction.adapters import FACTORS, Training, as_two_layers, sites_of
from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.seeding import seeded
from iosvd.layers.replacement import install_, twin_of


@dataclass(frozen=True)
class Lora(Training, Correction):
    """Train adapters of the left factors with fixed right factors, merge them; then vice versa.

    Rank, learning rate and epochs are the paper's (METHODS 7). The paper trains on Alpaca; here
    the text is the calibration set, so that every method sees the same text. Merging the adapters
    leaves the ranks of the factors as they are. While they are trained, the factors are in memory
    beside the dense model.
    """

    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-4
    epochs: int = 2
    batch_windows: int = 8
    seed: int = 0  # Of the adapters and of the order of the windows.

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        model = twin_of(inputs.calibration.model)
        install_(model, inputs.sites)
        with seeded(self.seed, inputs.calibration.model.device), as_two_layers(model) as pairs:
            for factor in FACTORS:
                layers = [f"{name}.{factor}" for name in pairs]
                self.train_and_merge(
                    model, layers, inputs.calibration, inputs.calibration.tokens, next_token_loss
                )
        return CorrectionResult(sites_of(model, inputs.sites), inputs.sites.ranks)


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of the next token, nats, of windows (windows, length)."""
    loss: Tensor = model(input_ids=windows, labels=windows, use_cache=False).loss
    return loss
