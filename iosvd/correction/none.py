"""No correction: the truncated layers as they are."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.correction.base import Corrected, Correction, Given
from iosvd.layers.replacement import replace_


@dataclass(frozen=True)
class NoCorrection(Correction):
    """One-shot truncation."""

    def __call__(self, given: Given) -> Corrected:
        replace_(given.model, given.sites)
        return Corrected(given.sites, given.sites.ranks)
