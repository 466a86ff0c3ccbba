"""No whitening: plain truncated SVD of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.linalg import IdentityRoot
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening


@dataclass(frozen=True)
class Identity(Whitening):
    """Plain SVD: M = W. It needs no calibration."""

    @property
    def needs(self) -> Needs:
        return Needs()

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        return Whitener(left=IdentityRoot(), right=IdentityRoot())
