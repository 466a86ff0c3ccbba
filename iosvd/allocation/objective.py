"""The calibration loss as a function of ranks, for allocations that measure it."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


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

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Return the calibration loss with each component multiplied by its gate.

        Args:
            gates: by site, a factor for each component of its spectrum; may ask for gradients.
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
