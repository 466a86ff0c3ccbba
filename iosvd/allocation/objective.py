"""Measurements on the calibration set as a function of ranks, for allocations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """The predictions that a divergence compares."""

    first_position: int = 0  # Of each window.
    temperature: float = 1.0  # That the logits of both models are divided by.


class CalibrationObjective(Protocol):
    """Measures the loss of the dense model on its calibration set, with some sites truncated."""

    @property
    def tokens(self) -> int:
        """Tokens of the calibration set."""
        ...

    @property
    def windows(self) -> int:
        """Windows of the calibration set."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a window."""
        ...

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Return the calibration loss with each component multiplied by its gate.

        Args:
            gates: by site, a factor for each component of its spectrum; may ask for gradients.
            chosen: indices of the windows.
        """
        ...

    def component_derivatives(self, counts: Mapping[str, int], chosen: Tensor) -> dict[str, Tensor]:
        """Return σ_i u_iᵀ G v_i of the first components, G the gradient of the calibration loss.

        Args:
            counts: by site, how many components.
            chosen: indices of the windows.
        """
        ...

    def loss(self, ranks: Mapping[str, int], windows: int) -> float:
        """Return the calibration loss, nats per token, with these ranks; other sites stay dense.

        Args:
            ranks: by site; above break-even a site is dense.
            windows: number of first windows of the calibration set; 0: all.
        """
        ...

    def divergence(self, ranks: Mapping[str, int], windows: int, predictions: Predictions) -> float:
        """Return KL(dense ‖ truncated), nats per token, with these ranks; other sites stay dense.

        Args:
            ranks: by site; above break-even a site is dense.
            windows: number of first windows of the calibration set; 0: all.
            predictions: which are compared.
        """
        ...
