"""ASVD: each input channel scaled by its mean magnitude (arXiv 2312.05821)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iosvd.errors import NumericalError, check_at_least
from iosvd.linalg import DiagonalRoot, IdentityRoot
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening


@dataclass(frozen=True)
class Asvd(Whitening):
    """L_R = diag(E|x_j|^α), L_C = I (METHODS 3).

    A channel that is never active would have scale 0 and no inverse; `damping` is added, relative
    to the mean scale.
    """

    alpha: float = 0.5  # The paper's choice.
    damping: float = 1e-6

    def __post_init__(self) -> None:
        check_at_least(0, damping=self.damping)

    @property
    def needs(self) -> Needs:
        return Needs(input_magnitude=True)

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        scale = statistics.need("input_magnitude") ** self.alpha
        if not (torch.isfinite(scale).all() and scale.mean() > 0):
            raise NumericalError(
                f"the inputs of {statistics.site} are all zero or not finite on the calibration"
                " set; exclude it (model.sites.exclude)"
            )
        scale = scale + self.damping * scale.mean()
        return Whitener(left=IdentityRoot(), right=DiagonalRoot(scale, self.damping))
