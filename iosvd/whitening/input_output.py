"""IO-SVD: whitening by the input metric and the top-K KL curvature (arXiv 2605.15626)."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.errors import check_at_least
from iosvd.statistics.kl_metric import Estimator, KLMetric
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening
from iosvd.whitening.double_sided import DoubleSided


@dataclass(frozen=True)
class InputOutput(DoubleSided, Whitening):
    """M = L_Cᵀ W L_R with roots of R = E[x xᵀ] and of the KL metric C (METHODS 2.2).

    C is per token, so ½ Σ σ² of the dropped components predicts KL(dense ‖ compressed) in nats per
    token: all of it with top_k = 0, else the share of the K most probable tokens. The paper damps
    both metrics; by how much is not documented.
    """

    top_k: int = 5  # Figure 3's best choice; 0 is the whole vocabulary.
    renormalize: bool = False  # Not documented; measured better without (METHODS 2.2).
    estimator: Estimator = Estimator.probe
    probes: int = 1
    seed: int = 0  # Of the random signs.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, top_k=self.top_k)
        check_at_least(1, probes=self.probes)

    @property
    def needs(self) -> Needs:
        kl_metric = KLMetric(
            top_k=self.top_k,
            renormalize=self.renormalize,
            estimator=self.estimator,
            probes=self.probes,
            seed=self.seed,
            tokens=self.output_tokens,
        )
        return Needs(input_metric=True, kl_metric=kl_metric)

    @property
    def predicts_kl(self) -> bool:
        # The metrics must be the measured ones at every site and token, and C not renormalised.
        everywhere = self.output_metric_roles == ["*"] and not self.output_tokens.changes
        measured = self.shrinkage_input == self.shrinkage_output == 0
        return everywhere and measured and not self.renormalize

    @property
    def predicts_whole_kl(self) -> bool:
        return self.predicts_kl and self.top_k == 0

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        metric_in, metric_out = statistics.need("input_metric"), statistics.need("kl_metric")
        return self.roots(statistics.site, metric_in, metric_out, "KL")
