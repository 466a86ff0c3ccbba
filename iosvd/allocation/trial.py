"""What an allocation may find out by trying ranks on the calibration set."""

from collections.abc import Mapping
from typing import Protocol


class Trial(Protocol):
    """The dense model and its calibration set, as an allocation sees them."""

    @property
    def tokens(self) -> int:
        """Tokens of the calibration set."""
        ...

    def loss(self, ranks: Mapping[str, int], windows: int) -> float:
        """Return the calibration loss, nats per token, with these ranks; other sites stay dense.

        Args:
            ranks: by site; above break-even a site is dense.
            windows: only the first so many of the calibration set; 0: all.
        """
        ...
