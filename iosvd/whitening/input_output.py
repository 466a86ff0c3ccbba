"""IO-SVD: whitening by the input metric and the top-K KL curvature (arXiv 2605.15626)."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.errors import check_at_least
from iosvd.kl_metric import Estimator, KLMetric
from iosvd.linalg import RootKind, root_of
from iosvd.types import Needs, SiteStatistics, Whitener


@dataclass(frozen=True)
class InputOutput:
    """M = L_Cᵀ W L_R with roots of R = E[x xᵀ] and of the KL metric C (METHODS 2.2).

    C is per token, so ½ Σ σ² of what is dropped predicts KL(dense ‖ compressed) in nats per token,
    wholly with top_k = 0 and the share of the K most probable tokens otherwise. The paper damps
    both metrics, by how much is not documented.
    """

    top_k: int = 5  # Figure 3's best choice; 0 is the whole vocabulary.
    renormalize: bool = False  # Not documented; measured better without (METHODS 2.2).
    estimator: Estimator = Estimator.probe
    probes: int = 1
    damping_input: float = 1e-6  # Relative to the mean diagonal of R.
    damping_output: float = 1e-6  # Relative to the mean diagonal of C.
    root: RootKind = RootKind.cholesky
    seed: int = 0  # Of the random signs.

    def __post_init__(self) -> None:
        check_at_least(0, top_k=self.top_k)
        check_at_least(1, probes=self.probes)
        check_at_least(0, damping_input=self.damping_input, damping_output=self.damping_output)

    @property
    def needs(self) -> Needs:
        kl_metric = KLMetric(self.top_k, self.renormalize, self.estimator, self.probes, self.seed)
        return Needs(input_metric=True, kl_metric=kl_metric)

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        metric_in, metric_out = statistics.need("input_metric"), statistics.need("kl_metric")
        what_in = f"the input metric of {statistics.site}"
        what_out = f"the KL metric of {statistics.site}"
        return Whitener(
            left=root_of(metric_out, self.damping_output, self.root, what_out),
            right=root_of(metric_in, self.damping_input, self.root, what_in),
        )
