"""What a correction is given, and what every correction is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from iosvd.factorization import Factorization
from iosvd.statistics.memory import MemoryUse
from iosvd.statistics.needs import SiteStatistics
from iosvd.truncation import TruncatedSites
from iosvd.types import Site
from iosvd.whitening import Whitening

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel

    from iosvd.allocation import Allocation


@dataclass(frozen=True)
class Given:
    """A dense model, what is planned for its sites, and what the calibration set tells of them."""

    model: PreTrainedModel  # Dense; the correction puts the compressed layers in place.
    sites: TruncatedSites  # All of them, with ranks, spectra and budget.
    statistics: Mapping[str, SiteStatistics]  # Of the dense model, as `needs_metrics` asks.
    tokens: Tensor  # Calibration windows (windows, length).
    whitening: Whitening
    allocation: Allocation
    factorization: Factorization
    batch_size: int
    memory: MemoryUse


@dataclass(frozen=True)
class Corrected:
    """What a correction leaves: the sites as they are in the model now."""

    sites: Mapping[str, Site]
    ranks: Mapping[str, int]


class Correction(Protocol):
    """What every correction is: a frozen dataclass, one file each.

    What it does not say otherwise, it inherits: it needs no metrics, and adds nothing to a site.
    """

    @property
    def needs_metrics(self) -> bool:
        """Whether it reads the statistics of the whitening."""
        return False

    @property
    def adds_bias(self) -> bool:
        """Whether factorised sites get a bias where they have none, which the budget counts."""
        return False

    def __call__(self, given: Given) -> Corrected:
        """Put the compressed layers in place, corrected."""
        ...
