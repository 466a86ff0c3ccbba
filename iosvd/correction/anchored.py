"""The anchored refit in both metrics (METHODS 7, ours)."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.correction.base import Corrected, Correction, Given
from iosvd.correction.refit import refit
from iosvd.correction.rule import Rule


@dataclass(frozen=True)
class Anchored(Correction):
    """Refit site by site to what the dense model puts out, from what the compressed prefix puts in.

    With R_c = E[x_c x_cᵀ] behind the compressed prefix and t the dense model's output, the best
    rank-k weight in the whitening's output metric C is the truncated SVD of L_Cᵀ W* L_{R_c}, where
    W* = E[t x_cᵀ] R_c⁻¹ is the best weight of full rank. With `stream`, a site whose output joins
    the residual stream has as target what the dense model's stream is after it, not its own output
    alone: so it makes good what earlier sites have lost, as far as it can be told from x_c.

    What it costs: one forward pass of the dense model over the calibration set and about three, in
    part, of the compressed one, the sums R_c and E[t x_cᵀ], and a factorisation for each site; no
    gradient. What was tried, with figures, is in results/LOG.md.
    """

    trust: float = 0.75  # 1: the target is t; 0: W x_c, what the site would put out by itself.
    ridge: float = 1e-3  # Towards W, relative to the mean diagonal of R_c.
    held_out: float = 0.0  # Share of the windows that choose the ridge for each site; 0: as given.
    stream: bool = True
    output_metric: bool = True  # False: the plain metric.
    bias: bool = False  # Give factorised sites a bias, for m numbers each; what has one, keeps it.
    dense_sites: bool = True  # Sites that stay dense are refitted too, for nothing.
    damping: float = 1e-6  # Of R_c, relative (METHODS 2.6).

    def __post_init__(self) -> None:
        self._rule()

    @property
    def needs_metrics(self) -> bool:
        return self.output_metric

    @property
    def adds_bias(self) -> bool:
        return self.bias

    def __call__(self, given: Given) -> Corrected:
        return Corrected(refit(given, self._rule()), given.sites.ranks)

    def _rule(self) -> Rule:
        return Rule(
            trust=self.trust,
            ridge=self.ridge,
            held_out=self.held_out,
            stream=self.stream,
            output_metric=self.output_metric,
            bias=self.bias,
            dense_sites=self.dense_sites,
            damping=self.damping,
        )
