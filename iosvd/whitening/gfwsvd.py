"""GFWSVD: whitening by the Kronecker factors of the weight's Fisher (arXiv 2505.17974)."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.errors import check_at_least
from iosvd.linalg import RootKind, root_of
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening


@dataclass(frozen=True)
class Gfwsvd(Whitening):
    """M = L_Bᵀ W L_A, where the product of B (m, m) and A (n, n) is nearest to the Fisher of W.

    The factors are found by alternating power iterations (iosvd/statistics/kronecker.py) on the
    gradients of single windows; the paper runs Lanczos' method on the same rearranged matrix. Each
    pass over the calibration set is one half of an iteration.
    """

    passes: int = 4
    damping: float = 1e-6  # Relative to the mean diagonal of each factor.
    root: RootKind = RootKind.cholesky

    def __post_init__(self) -> None:
        check_at_least(2, passes=self.passes)
        check_at_least(0, damping=self.damping)

    @property
    def needs(self) -> Needs:
        return Needs(kronecker_passes=self.passes)

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        left, right = statistics.need("kronecker_left"), statistics.need("kronecker_right")
        what = f"Kronecker factor of {statistics.site}"
        return Whitener(
            left=root_of(left, self.damping, self.root, f"the output {what}"),
            right=root_of(right, self.damping, self.root, f"the input {what}"),
        )
