"""The contract of an allocation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from iosvd.allocation.objective import CalibrationObjective
from iosvd.budget import Budget
from iosvd.statistics.needs import Needs
from iosvd.types import Spectrum


class Allocation(Protocol):
    """Chooses the rank of every site under one budget: a frozen dataclass, one file each.

    A site whose rank is above its break-even rank stays dense; no rank is below the site's floor in
    the budget. The defaults need no statistics and measure no loss.
    """

    @property
    def needs(self) -> Needs:
        """The statistics it reads, besides those of the whitening."""
        return Needs()

    @property
    def trial_windows(self) -> int | None:
        """Calibration windows of the losses that it measures; 0: all windows; None: no losses."""
        return None

    @property
    def spends_rest(self) -> bool:
        """Whether less than one component of the budget is left, unless all sites are dense."""
        return True

    @property
    def libraries(self) -> tuple[str, ...]:
        """Optional libraries that it imports; checked before any work is done."""
        return ()

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        """Return ranks whose cost is within the budget."""
        ...
