"""The contract of an allocation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from iosvd.allocation.trial import Trial
from iosvd.budget import Budget
from iosvd.statistics.needs import Needs
from iosvd.types import Spectrum


class Allocation(Protocol):
    """Chooses the rank of every site under one budget: a frozen dataclass, one file each.

    A rank above a site's break-even rank means that the site stays dense; none is below the site's
    floor in the budget. What an allocation does not say otherwise, it inherits: it needs no
    statistics and tries nothing.
    """

    @property
    def needs(self) -> Needs:
        """The statistics it reads, beside those of the whitening."""
        return Needs()

    @property
    def trial_windows(self) -> int | None:
        """Calibration windows of a loss that it measures: 0 is all of them, None no loss at all."""
        return None

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, trial: Trial
    ) -> dict[str, int]:
        """Return ranks whose cost is within the budget, and less than one component below it."""
        ...
