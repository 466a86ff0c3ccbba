"""Whitenings: from the statistics of a site to the two roots that its weight is whitened with.

To add one, write its file, a frozen dataclass that inherits from `Whitening`, and give it a YAML
in `conf/whitening`; those here are exported for Python.
"""

from iosvd.whitening.asvd import Asvd
from iosvd.whitening.base import Whitening
from iosvd.whitening.channel_weighted import ChannelWeighted
from iosvd.whitening.fisher import Fisher
from iosvd.whitening.fwsvd import Fwsvd
from iosvd.whitening.gfwsvd import Gfwsvd
from iosvd.whitening.identity import Identity
from iosvd.whitening.input import Input
from iosvd.whitening.input_output import InputOutput

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
]
