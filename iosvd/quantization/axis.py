"""The rows of factors, and the cost of a site with all rows in int8."""

from __future__ import annotations

from enum import Enum

from iosvd.budget import Shape, SiteCost
from iosvd.layers.rows import SCALE_BITS, int8_row_bits


class Axis(Enum):
    """The entries that share a scale. The row of a dense weight is always an output channel.

    channel: a row of U (m, k) is an output channel, a row of V (n, k) an input channel.
    component: a row is a component's vector, a column of U or of V.
    output: the rows as a linear layer stores them, output channels of U and components of V.
    """

    channel = "channel"
    component = "component"
    output = "output"

    def by_output(self, matrix: str, dense: bool) -> bool:
        """Whether a row of the matrix holds the weights of one output, or of one input."""
        if dense or self is Axis.output:
            return True
        return (matrix == "left") == (self is Axis.channel)

    def int8_cost(self, shape: Shape) -> SiteCost:
        """Return the cost of a site with all rows in int8, scales included."""
        m, n = shape.m, shape.n
        scales = {
            Axis.channel: (m + n, 0),
            Axis.component: (0, 2),
            Axis.output: (m, 1),
        }
        fixed, per_component = scales[self]
        return SiteCost(
            dense=m * int8_row_bits(n),
            fixed=SCALE_BITS * fixed,
            component=8 * (m + n) + SCALE_BITS * per_component,
        )
