"""The contract of a whitening."""

from __future__ import annotations

from typing import Protocol

from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener


class Whitening(Protocol):
    """Chooses the two roots that a site's weight is whitened with: a frozen dataclass.

    A whitening names the statistics it needs and turns those of a site into roots. Everything else
    has a default here.
    """

    @property
    def needs(self) -> Needs:
        """The statistics it reads."""
        ...

    @property
    def predicts_kl(self) -> bool:
        """Whether ½ Σ σ² of dropped components is a KL divergence or its top-K share."""
        return False

    @property
    def predicts_whole_kl(self) -> bool:
        """Whether it is the whole divergence, over the full vocabulary."""
        return False

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        """Return the roots for one site."""
        ...
