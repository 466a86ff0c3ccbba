"""SVD-LLM's update of the factors by low-rank adapters (2403.07378)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from iosvd.correction.adapters import FACTORS, Loss, Training, as_two_layers, sites_of
from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.seeding import seeded
from iosvd.correction.work import CorrectionWork, PlannedModel
from iosvd.layers.replacement import install_, twin_of
from iosvd.models.losses import summed_loss
from iosvd.statistics.planning import Work
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


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

    def work(self, planned: PlannedModel) -> CorrectionWork:
        # Forward, and backward to the activations alone, for each of the two factors.
        compressed = planned.compressed + planned.shapes.head
        return CorrectionWork(Work(4 * self.epochs * compressed, 0))

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        model = twin_of(inputs.calibration.model)
        install_(model, inputs.sites)
        with seeded(self.seed, inputs.calibration.model.device), as_two_layers(model) as pairs:
            of_next_token = Loss(next_token_loss, lambda windows: windows.predictions)
            for factor in FACTORS:
                layers = [f"{name}.{factor}" for name in pairs]
                self.train_and_merge(
                    model, layers, inputs.calibration, inputs.calibration.windows, of_next_token
                )
        return CorrectionResult(sites_of(model, inputs.sites), inputs.sites.ranks)


def next_token_loss(model: PreTrainedModel, windows: Windows) -> Tensor:
    """Return the summed loss of the next tokens, nats."""
    return summed_loss(windows.logits(model), windows.labels)
