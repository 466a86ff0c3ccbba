"""Whitenings: from the statistics of a site to the two roots that its weight is whitened with.

A whitening is a frozen dataclass with `needs` and a call; one file each. To add one, write its
file and give it a YAML in `conf/whitening`; those here are exported for Python.
"""

from typing import Protocol

from iosvd.types import Needs, SiteStatistics, Whitener
from iosvd.whitening.asvd import Asvd
from iosvd.whitening.channel_weighted import ChannelWeighted
from iosvd.whitening.fisher import Fisher
from iosvd.whitening.fwsvd import Fwsvd
from iosvd.whitening.gfwsvd import Gfwsvd
from iosvd.whitening.identity import Identity
from iosvd.whitening.input import Input
from iosvd.whitening.input_output import InputOutput


class Whitening(Protocol):
    """What every whitening is."""

    @property
    def needs(self) -> Needs:
        """The statistics it reads."""
        ...

    def __call__(self, statistics: SiteStatistics) -> Whitener:
        """Return the roots for one site."""
        ...


def predicts_kl(whitening: Whitening) -> bool:
    """Whether ½ Σ σ² of what is dropped is a KL divergence, or its top-K share (METHODS 1, 5)."""
    return isinstance(whitening, InputOutput) and whitening.predicts_kl


__all__ = [
    "Asvd",
    "ChannelWeighted",
    "Fisher",
    "Fwsvd",
    "Gfwsvd",
    "Identity",
    "Input",
    "InputOutput",
    "Whitening",
    "predicts_kl",
]
