"""IO-SVD: whitening by the input metric and the top-K KL curvature (arXiv 2605.15626)."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from iosvd.errors import check_at_least
from iosvd.linalg import DiagonalRoot, Root, RootKind, root_of
from iosvd.models.sites import layer_and_role
from iosvd.statistics.kl_metric import Estimator, KLMetric
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Whitener
from iosvd.whitening.base import Whitening


@dataclass(frozen=True)
class InputOutput(Whitening):
    """M = L_Cᵀ W L_R with roots of R = E[x xᵀ] and of the KL metric C (METHODS 2.2).

    C is per token, so ½ Σ σ² of the dropped components predicts KL(dense ‖ compressed) in nats per
    token: all of it with top_k = 0, else the share of the K most probable tokens. The paper damps
    both metrics; by how much is not documented.

    Sites whose role is not in `output_metric_roles` have only the mean of C's diagonal as output
    metric, the same for all outputs: only their inputs whiten them, and their σ² stay comparable
    with those of other sites.
    """

    top_k: int = 5  # Figure 3's best choice; 0 is the whole vocabulary.
    renormalize: bool = False  # Not documented; measured better without (METHODS 2.2).
    estimator: Estimator = Estimator.probe
    probes: int = 1
    damping_input: float = 1e-6  # Relative to the mean diagonal of R.
    damping_output: float = 1e-6  # Relative to the mean diagonal of C.
    root: RootKind = RootKind.cholesky
    seed: int = 0  # Of the random signs.
    # By glob on the role, such as self_attn.q_proj, or its last part; the paper's are all. Third
    # parties leave out q and k (METHODS 3).
    output_metric_roles: list[str] = field(default_factory=lambda: ["*"])

    def __post_init__(self) -> None:
        check_at_least(0, top_k=self.top_k)
        check_at_least(1, probes=self.probes)
        check_at_least(0, damping_input=self.damping_input, damping_output=self.damping_output)

    @property
    def needs(self) -> Needs:
        kl_metric = KLMetric(self.top_k, self.renormalize, self.estimator, self.probes, self.seed)
        return Needs(input_metric=True, kl_metric=kl_metric)

    @property
    def predicts_kl(self) -> bool:
        # C must be the KL metric at every site, as it is and not renormalised.
        return self.output_metric_roles == ["*"] and not self.renormalize

    @property
    def predicts_whole_kl(self) -> bool:
        return self.predicts_kl and self.top_k == 0

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        metric_in, metric_out = statistics.need("input_metric"), statistics.need("kl_metric")
        what_in = f"the input metric of {statistics.site}"
        what_out = f"the KL metric of {statistics.site}"
        return Whitener(
            left=self._left(statistics.site, metric_out, what_out),
            right=root_of(metric_in, self.damping_input, self.root, what_in),
        )

    def _left(self, site: str, metric: Tensor, what: str) -> Root:
        role = layer_and_role(site)[1]
        names = (role, role.rpartition(".")[2])
        if any(fnmatchcase(name, p) for name in names for p in self.output_metric_roles):
            return root_of(metric, self.damping_output, self.root, what)
        diagonal = metric.diagonal()
        return DiagonalRoot(diagonal.mean().sqrt().expand_as(diagonal))
