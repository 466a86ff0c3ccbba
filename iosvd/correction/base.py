"""The contract of a correction: its inputs, its result, and defaults for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from iosvd.allocation import Allocation
from iosvd.cache.calibration import Calibration
from iosvd.cache.keys import SpectrumKeys
from iosvd.correction.work import CorrectionWork, PlannedModel
from iosvd.factorization import Factorization
from iosvd.statistics.needs import SiteStatistics
from iosvd.system.timing import Stage
from iosvd.truncation import TruncatedSites
from iosvd.types import Site
from iosvd.whitening import Whitening


@dataclass(frozen=True)
class CorrectionInputs:
    """The dense model, its truncated sites, and the calibration set."""

    calibration: Calibration  # Its model is dense.
    sites: TruncatedSites  # All sites, with ranks, spectra and budget; factors in main memory.
    statistics: Mapping[str, SiteStatistics]  # The whitening's; empty unless `needs_metrics`.
    whitening: Whitening
    allocation: Allocation
    factorization: Factorization

    @property
    def spectra(self) -> SpectrumKeys:
        """The keys of the spectra that were truncated."""
        return SpectrumKeys(self.calibration.keys, self.whitening, self.factorization)

    @property
    def factorised(self) -> Mapping[str, int]:
        """The ranks of the sites that do not stay dense."""
        return self.sites.budget.factorised(self.sites.ranks)


@dataclass(frozen=True)
class CorrectionResult:
    """The corrected sites, to be installed in the model, and their ranks."""

    sites: Mapping[str, Site]
    ranks: Mapping[str, int]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)  # Others that have changed.
    costs: Sequence[Stage] = ()  # Of parts: peaks, and the seconds that an earlier run spent.


class Correction(Protocol):
    """Changes truncated sites so that together they predict what the dense model predicts.

    A correction is a frozen dataclass that can be called. It leaves the dense model as it is: the
    pipeline installs the sites that it returns.
    """

    @property
    def needs_metrics(self) -> bool:
        """Whether it reads the statistics of the whitening."""
        return False

    @property
    def adds_bias(self) -> bool:
        """Whether factorised sites without a bias get one, which the budget counts."""
        return False

    @property
    def works_on_visits(self) -> bool:
        """Whether it works on blocks that live in main memory (models/visiting.py)."""
        return False

    @property
    def libraries(self) -> tuple[str, ...]:
        """Optional libraries that it imports; checked before any work is done."""
        return ()

    def work(self, planned: PlannedModel) -> CorrectionWork | None:
        """Return what it computes and holds; None if nobody has counted it."""
        return None

    def check(self, calibration: Calibration) -> None:
        """Raise ConfigError if it cannot correct this model on these windows; before any work."""
        return

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        """Return the corrected sites."""
        ...
