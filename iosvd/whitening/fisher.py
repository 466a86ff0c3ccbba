"""OBD-LLM: whitening by the inputs and the Fisher information of the outputs (arXiv 2604.00821)."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.errors import check_at_least
from iosvd.linalg import RootKind, root_of
from iosvd.statistics.fisher import FisherMetric, Labels
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening


@dataclass(frozen=True)
class Fisher(Whitening):
    """M = L_Cᵀ W L_R with roots of R = E[x xᵀ] and of E[g gᵀ], g = ∂ℓ/∂y (METHODS 2.3 and 3).

    With the labels of the text this is the empirical Fisher; with sampled ones its expectation is
    IO-SVD's KL metric of the whole vocabulary.
    """

    labels: Labels = Labels.text
    damping_input: float = 1e-6  # Relative to the mean diagonal of R.
    damping_output: float = 1e-6  # Relative to the mean diagonal of E[g gᵀ].
    root: RootKind = RootKind.cholesky
    seed: int = 0  # Of the sampled labels.

    def __post_init__(self) -> None:
        check_at_least(0, damping_input=self.damping_input, damping_output=self.damping_output)

    @property
    def needs(self) -> Needs:
        return Needs(input_metric=True, fisher_metric=FisherMetric(self.labels, self.seed))

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        metric_in, metric_out = statistics.need("input_metric"), statistics.need("fisher_metric")
        what_in = f"the input metric of {statistics.site}"
        what_out = f"the Fisher metric of {statistics.site}"
        return Whitener(
            left=root_of(metric_out, self.damping_output, self.root, what_out),
            right=root_of(metric_in, self.damping_input, self.root, what_in),
        )
