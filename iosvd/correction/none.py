"""No correction: one-shot truncation."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.work import CorrectionWork, PlannedModel


@dataclass(frozen=True)
class NoCorrection(Correction):
    """Leave the truncated sites as they are."""

    @property
    def works_on_visits(self) -> bool:
        return True

    def work(self, planned: PlannedModel) -> CorrectionWork:
        return CorrectionWork()

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        return CorrectionResult(inputs.sites, inputs.sites.ranks)
