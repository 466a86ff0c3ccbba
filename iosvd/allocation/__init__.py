"""Allocations: from all spectra and one budget to the rank of every site.

An allocation is a frozen dataclass with `needs` and a call; one file each. A rank above a site's
break-even rank means that the site stays dense; none is below the site's floor in the budget. To
add one, write its file and give it a YAML in `conf/allocation`; those here are exported for Python.
"""

from collections.abc import Mapping
from typing import Protocol

from iosvd.allocation.hull import Hull
from iosvd.allocation.layer_importance import LayerImportance
from iosvd.allocation.learned import Learned
from iosvd.allocation.loss_aware import LossAware
from iosvd.allocation.sensitivity_search import SensitivitySearch
from iosvd.allocation.spectral import Spectral
from iosvd.allocation.trial import Trial
from iosvd.allocation.type_grouped import TypeGrouped
from iosvd.allocation.uniform import Uniform
from iosvd.allocation.zero_sum import ZeroSum
from iosvd.budget import Budget
from iosvd.types import Needs, Spectrum


class Allocation(Protocol):
    """What every allocation is."""

    @property
    def needs(self) -> Needs:
        """The statistics it reads."""
        ...

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, trial: Trial
    ) -> dict[str, int]:
        """Return ranks whose cost is within the budget, and less than one component below it."""
        ...


__all__ = [
    "Allocation",
    "Hull",
    "LayerImportance",
    "Learned",
    "LossAware",
    "SensitivitySearch",
    "Spectral",
    "Trial",
    "TypeGrouped",
    "Uniform",
    "ZeroSum",
]
