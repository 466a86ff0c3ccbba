"""Quantisations: how the factors are stored, and so how many bits an entry costs."""

from iosvd.quantization.none import NoQuantization

__all__ = ["NoQuantization"]
