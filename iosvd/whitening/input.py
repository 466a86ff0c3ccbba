"""SVD-LLM: whitening by the input metric (arXiv 2403.07378)."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.errors import check_at_least
from iosvd.linalg import IdentityRoot, RootKind, raised, root_of
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening


@dataclass(frozen=True)
class Input(Whitening):
    """L_R a root of R = E[x xᵀ], L_C = I: least squared error of the output (METHODS 3).

    SVD-LLM takes the Cholesky root, SVD-LLM V2 (arXiv 2503.12340) the eigendecomposition; the
    truncated weight is the same. ZS-SVD's public code adds 1e-4 I to R whatever R's size.
    """

    damping: float = 1e-6  # Relative to the mean diagonal of R.
    damping_absolute: float = 0.0  # Added to R's diagonal besides.
    root: RootKind = RootKind.cholesky

    def __post_init__(self) -> None:
        check_at_least(0, damping=self.damping, damping_absolute=self.damping_absolute)

    @property
    def needs(self) -> Needs:
        return Needs(input_metric=True)

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        what = f"the input metric of {statistics.site}"
        metric = raised(statistics.need("input_metric"), self.damping_absolute)
        right = root_of(metric, self.damping, self.root, what)
        return Whitener(left=IdentityRoot(), right=right)
