"""DipSVD: whitening by the inputs, with the strongest channels weighted up (arXiv 2506.20353)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from iosvd.errors import ConfigError, check_at_least
from iosvd.linalg import IdentityRoot, RootKind, damped, root_of, singular_root
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening


class Weighting(Enum):
    """Readings of the weighting: of R's columns, as in the public code, or of the inputs."""

    columns = "columns"
    inputs = "inputs"


@dataclass(frozen=True)
class ChannelWeighted(Whitening):
    """L_R from R = E[x xᵀ] with the `share` largest-norm columns multiplied by `factor`; L_C = I.

    Two readings differ. The public code multiplies the columns of R and takes U√D of the SVD of the
    unsymmetric result (`columns`, METHODS 3); the paper's text weights the channels of the inputs,
    so that D R D is factorised (`inputs`). The norm of column j is the paper's importance
    √(x_jᵀ X Xᵀ x_j) of channel j.
    """

    share: float = 0.05  # Of the channels, rounded down: the public code's.
    factor: float = 30.0  # The public code's.
    weighting: Weighting = Weighting.columns
    damping: float = 1e-6  # Relative to the mean diagonal of R.

    def __post_init__(self) -> None:
        check_at_least(0, share=self.share, damping=self.damping)
        check_at_least(1, factor=self.factor)
        if self.share > 1:
            raise ConfigError(f"share={self.share} is above 1; it is a share of the channels")

    @property
    def needs(self) -> Needs:
        return Needs(input_metric=True)

    def weights(self, metric: Tensor) -> Tensor:
        """Return what each channel is multiplied by, (n,), for an input metric (n, n)."""
        strongest = metric.norm(dim=0).argsort(descending=True)[: int(self.share * len(metric))]
        weights = torch.ones(len(metric), dtype=metric.dtype, device=metric.device)
        weights[strongest] = self.factor
        return weights

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        what = f"the input metric of {statistics.site}"
        metric = statistics.need("input_metric")
        weights = self.weights(metric)
        if self.weighting is Weighting.inputs:
            weighted = weights[:, None] * metric * weights
            right = root_of(weighted, self.damping, RootKind.eigen, what)
        else:
            right = singular_root(damped(metric, self.damping) * weights, self.damping, what)
        return Whitener(left=IdentityRoot(), right=right)
