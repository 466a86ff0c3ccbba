"""What an allocation may find out by trying ranks on the calibration set."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Trial(Protocol):
    """The dense model and its calibration set, as an allocation sees them."""

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
            chosen: the windows that count, by number.
        """
        ...

    def loss(self, ranks: Mapping[str, int], windows: int) -> float:
        """Return the calibration loss, nats per token, with these ranks; other sites stay dense.

        Args:
            ranks: by site; above break-even a site is dense.
            windows: only the first so many of the calibration set; 0: all.
        """
        ...
