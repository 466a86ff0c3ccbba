"""The anchored refit in both metrics (METHODS 7, ours)."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.blockwise import BlockSteps, correct_blocks
from iosvd.correction.refit_options import RefitOptions
from iosvd.correction.work import CorrectionWork, PlannedModel


@dataclass(frozen=True)
class Anchored(RefitOptions, Correction):
    """Refit each site to the dense model's output, given its input behind the compressed prefix.

    With R_c = E[x_c x_cᵀ] behind the compressed prefix and t the dense model's output, the best
    rank-k weight in the whitening's output metric C is the truncated SVD of L_Cᵀ W* L_{R_c}, where
    W* = E[t x_cᵀ] R_c⁻¹ is the best weight of full rank. With `stream`, the target of a site that
    writes to the residual stream is the dense model's stream after that site, not the site's
    output alone: the refit also compensates, as far as x_c allows, for what earlier sites lost.

    Cost: one forward pass of the dense model over the calibration set, about three partial passes
    of the compressed one, the sums R_c and E[t x_cᵀ], and one factorisation per site; no gradient.
    Experiments and figures are in results/LOG.md.
    """

    @property
    def needs_metrics(self) -> bool:
        return self.output_metric

    @property
    def adds_bias(self) -> bool:
        return self.bias

    def work(self, planned: PlannedModel) -> CorrectionWork:
        return self.closed_form_work(planned)

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        return correct_blocks(inputs, BlockSteps(closed_form=self))
