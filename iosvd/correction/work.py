"""The cost of a correction, estimated from a model's shapes before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.statistics.planning import Outline, Work

_TRAINED_FLOATS = 5  # Of a trained parameter in float32: its master, two gradients, two moments.
_TRAINED_COPIES = 3  # And in the model's dtype: itself, its gradient, the best epoch's.


@dataclass(frozen=True)
class PlannedModel:
    """A model, and how much of it a compression keeps."""

    shapes: Outline
    ratio: float  # Of the sites' weights that are kept.
    length: int  # Tokens of a calibration window.

    @property
    def compressed(self) -> float:
        """Multiplications of the compressed sites per token, forward."""
        return self.ratio * self.shapes.body


@dataclass(frozen=True)
class CorrectionWork:
    """The cost of a correction; attention, norms and the softmax are not counted."""

    passes: Work = Work(0, 0)  # noqa: RUF009 (frozen) Multiplications per calibration token.
    factorizations: int = 0  # Of every site.
    training_bytes: int = 0  # Of trained parameters and what their optimiser keeps.

    def __add__(self, other: CorrectionWork) -> CorrectionWork:
        return CorrectionWork(
            self.passes + other.passes,
            self.factorizations + other.factorizations,
            max(self.training_bytes, other.training_bytes),  # One after the other.
        )


def training_bytes(parameters: float, entry_bytes: int) -> int:
    """Return what the training of so many parameters keeps, beside activations.

    Args:
        parameters: that are trained.
        entry_bytes: of the model's dtype.
    """
    return round(parameters * (4 * _TRAINED_FLOATS + entry_bytes * _TRAINED_COPIES))
