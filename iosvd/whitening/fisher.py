"""OBD-LLM and KFAC-SVD: whitening by the inputs and the Fisher information of the outputs."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.statistics.fisher import FisherMetric, Labels
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening
from iosvd.whitening.double_sided import DoubleSided


@dataclass(frozen=True)
class Fisher(DoubleSided, Whitening):
    """M = L_Cᵀ W L_R with roots of R = E[x xᵀ] and of C = E[g gᵀ], g = ∂ℓ/∂y (METHODS 2.3 and 3).

    OBD-LLM (arXiv 2604.00821) takes both as they are. KFAC-SVD (arXiv 2610.32878) adds the
    stabilisers of `DoubleSided` (METHODS 11.1, conf/whitening/kfac.yaml). With the labels of the
    text C is the empirical Fisher; with sampled ones its expectation is IO-SVD's KL metric of the
    whole vocabulary.
    """

    labels: Labels = Labels.text
    seed: int = 0  # Of the sampled labels.

    @property
    def needs(self) -> Needs:
        fisher_metric = FisherMetric(self.labels, self.seed, self.output_tokens)
        return Needs(input_metric=True, fisher_metric=fisher_metric)

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        metric_in, metric_out = statistics.need("input_metric"), statistics.need("fisher_metric")
        return self.roots(statistics.site, metric_in, metric_out, "Fisher")
