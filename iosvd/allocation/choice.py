"""One option for every site, at the least total loss under a budget: an integer program."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from iosvd.errors import NumericalError, extra

log = logging.getLogger(__name__)
_GAP = 1e-5  # Relative, to the proven bound; far less than the model of the losses is worth.
_NODES = 20_000  # After which the best choice so far is taken.
_SCALE = 1000.0  # Of the losses' mean sum: the solver's absolute tolerance is 1e-6.


@dataclass(frozen=True)
class Option:
    """A rank that a site may have."""

    rank: int
    bits: int
    loss: float


def cheapest_choice(options: Mapping[str, Sequence[Option]], limit: int) -> dict[str, int]:
    """Return one rank a site: the sum of losses is least, and that of bits within the limit.

    Solved by HiGHS's branch and bound, to a relative gap of 1e-5. The relaxed program has at most
    one site that is divided between options, so its bound is within one step of a site.

    Args:
        options: of each site; the cheapest ones together fit.
        limit: bits.

    Raises:
        NumericalError: the solver found no choice.
    """
    with extra("scipy"):
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

    pairs = [(site, option) for site, found in options.items() for option in found]
    unit = math.gcd(*(option.bits for _, option in pairs))
    bits = np.array([option.bits // unit for _, option in pairs], dtype=float)
    rows = {site: row for row, site in enumerate(options)}
    where = np.array([rows[site] for site, _ in pairs])
    one_each = csr_array((np.ones(len(pairs)), (where, np.arange(len(pairs)))))
    losses = np.array([option.loss for _, option in pairs])
    largest = np.zeros(len(options))
    np.maximum.at(largest, where, losses)
    scale = _SCALE / largest.sum() if largest.sum() > 0 else 1.0
    for room in range(limit // unit, -1, -1):  # One less if rounding let the solver overspend.
        found = milp(
            scale * losses,
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(bits[None]), -np.inf, room),
            ],
            options={"node_limit": _NODES, "mip_rel_gap": _GAP},
        )
        if found.x is None:
            break
        if found.status == 1:
            log.warning("LEMS: these ranks are not proven to be within %g of the best", _GAP)
        chosen = [pairs[i] for i in np.flatnonzero(found.x > 0.5)]
        if sum(option.bits for _, option in chosen) <= limit and len(chosen) == len(options):
            return {site: option.rank for site, option in chosen}
    raise NumericalError(f"the integer program of the ranks has no solution: {found.message}")
