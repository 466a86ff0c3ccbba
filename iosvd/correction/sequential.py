"""Layer by layer on the compressed prefix: SAES-SVD (2602.03051) and AA-SVD's closed form."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.correction.adaptive_trust import AdaptiveTrust
from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.blockwise import BlockSteps, correct_blocks
from iosvd.correction.refit_options import RefitOptions
from iosvd.correction.work import CorrectionWork, PlannedModel
from iosvd.errors import ConfigError, check_at_least


@dataclass(frozen=True)
class Sequential(Correction):
    """min_A ‖A X − W X‖² + α ‖A X − W X_f‖², X behind the compressed prefix, X_f dense (METHODS 7).

    Both terms together have the target (W X + α W X_f) / (1 + α), so the closed form is that of
    the anchored refit with trust α / (1 + α), in the plain output metric, for truncated sites only.
    SAES-SVD chooses α for each site (`adaptive`; METHODS 11.4). With `anchored` only the second
    term remains: AA-SVD (2604.02119) before its block refinement.
    """

    alpha: float = 1.0
    anchored: bool = False  # True: the second term alone, α → ∞.
    adaptive: AdaptiveTrust | None = None  # Chooses α / (1 + α) of each site instead.
    ridge: float = 1e-6
    damping: float = 1e-6  # Of the second moment of X, relative (METHODS 2.6).

    def __post_init__(self) -> None:
        check_at_least(0, alpha=self.alpha)
        if self.anchored and self.adaptive is not None:
            raise ConfigError("correction.anchored and correction.adaptive both choose the target")
        self._options()

    def work(self, planned: PlannedModel) -> CorrectionWork:
        return self._options().closed_form_work(planned)

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        return correct_blocks(inputs, BlockSteps(closed_form=self._options()))

    def _options(self) -> RefitOptions:
        return RefitOptions(
            trust=1.0 if self.anchored else self.alpha / (1 + self.alpha),
            adaptive=self.adaptive,
            ridge=self.ridge,
            stream=False,
            output_metric=False,
            dense_sites=False,
            damping=self.damping,
        )
