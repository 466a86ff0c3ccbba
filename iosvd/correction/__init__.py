"""Corrections: change the truncated sites so that together they predict better; one file each.

A correction comes after the allocation and before the quantisation. To add one, write its file and
a YAML in `conf/correction`; see docs/extending.md. Those here are exported for Python.
"""

from iosvd.correction.anchored import Anchored
from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.distilled import Distilled
from iosvd.correction.end_to_end import EndToEnd
from iosvd.correction.ladder import Ladder
from iosvd.correction.lora import Lora
from iosvd.correction.none import NoCorrection
from iosvd.correction.projected_gradient import ProjectedGradient
from iosvd.correction.randomized import Randomized
from iosvd.correction.refinement import BlockLoss, Refinement
from iosvd.correction.refit_options import RefitOptions
from iosvd.correction.sequential import Sequential
from iosvd.correction.weighted_refit import WeightedRefit

__all__ = [
    "Anchored",
    "BlockLoss",
    "Correction",
    "CorrectionInputs",
    "CorrectionResult",
    "Distilled",
    "EndToEnd",
    "Ladder",
    "Lora",
    "NoCorrection",
    "ProjectedGradient",
    "Randomized",
    "Refinement",
    "RefitOptions",
    "Sequential",
    "WeightedRefit",
]
