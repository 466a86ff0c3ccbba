"""Corrections: what is done to the truncated sites so that they work together; one file each.

A correction comes after the allocation and before the quantisation. It is a frozen dataclass with a
call that puts the compressed layers in place. To add one, write its file and give it a YAML in
`conf/correction`; those here are exported for Python.
"""

from iosvd.correction.anchored import Anchored
from iosvd.correction.base import Corrected, Correction, Given
from iosvd.correction.distilled import Distilled
from iosvd.correction.lora import Lora
from iosvd.correction.none import NoCorrection
from iosvd.correction.projected_gradient import ProjectedGradient
from iosvd.correction.sequential import Sequential

__all__ = [
    "Anchored",
    "Corrected",
    "Correction",
    "Distilled",
    "Given",
    "Lora",
    "NoCorrection",
    "ProjectedGradient",
    "Sequential",
]
