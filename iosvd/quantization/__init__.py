"""Quantisations: how the factors are stored, and so how many bits an entry costs; one file each."""

from iosvd.quantization.base import Quantization, Site, Stored
from iosvd.quantization.half import Half
from iosvd.quantization.loss_aware import LossAwareRemap
from iosvd.quantization.none import NoQuantization
from iosvd.quantization.remap import Remap
from iosvd.quantization.round_to_nearest import RoundToNearest

__all__ = [
    "Half",
    "LossAwareRemap",
    "NoQuantization",
    "Quantization",
    "Remap",
    "RoundToNearest",
    "Site",
    "Stored",
]
