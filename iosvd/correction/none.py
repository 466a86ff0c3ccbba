"""No correction: the truncated layers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.correction.base import Correction, Given
from iosvd.quantization.base import Site
from iosvd.replacement import replace_


@dataclass(frozen=True)
class NoCorrection(Correction):
    """One-shot truncation."""

    def __call__(self, given: Given) -> Mapping[str, Site]:
        replace_(given.model, given.sites)
        return given.sites
