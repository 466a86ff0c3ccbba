"""FWSVD: each output row weighted by its Fisher information (arXiv 2207.00112)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iosvd.errors import NumericalError, check_at_least
from iosvd.linalg import DiagonalRoot, IdentityRoot
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening


@dataclass(frozen=True)
class Fwsvd(Whitening):
    """L_C = diag(√Σ_j E[(∂ℓ/∂W_ij)²]), L_R = I (METHODS 3).

    The expectation is over calibration windows, each with the mean loss of its tokens: the paper's
    samples are sequences. A row without gradient would have no inverse; `damping` is added,
    relative to the mean weight.
    """

    damping: float = 1e-6

    def __post_init__(self) -> None:
        check_at_least(0, damping=self.damping)

    @property
    def needs(self) -> Needs:
        return Needs(fisher_rows=True)

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        scale = statistics.need("fisher_rows").sqrt()
        if not (torch.isfinite(scale).all() and scale.mean() > 0):
            raise NumericalError(
                f"the gradients of {statistics.site} are all zero or not finite on the calibration"
                " set; exclude it (model.sites.exclude)"
            )
        scale = scale + self.damping * scale.mean()
        return Whitener(left=DiagonalRoot(scale, self.damping), right=IdentityRoot())
