"""Quantisations: how factors are stored, and the bits that an entry costs; one file each."""

from iosvd.quantization.axis import Axis
from iosvd.quantization.base import Quantization
from iosvd.quantization.half import Half
from iosvd.quantization.loss_aware import LossAwareRemap, RankBudget
from iosvd.quantization.none import NoQuantization
from iosvd.quantization.remap import Remap
from iosvd.quantization.round_to_nearest import RoundToNearest
from iosvd.quantization.scores import Score

__all__ = [
    "Axis",
    "Half",
    "LossAwareRemap",
    "NoQuantization",
    "Quantization",
    "RankBudget",
    "Remap",
    "RoundToNearest",
    "Score",
]
