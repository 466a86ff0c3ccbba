"""SVD-LLM V2's allocation: within each type of weight, by truncation loss (arXiv 2503.12340)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from iosvd.allocation.base import Allocation
from iosvd.allocation.objective import CalibrationObjective
from iosvd.allocation.shares import ranks_for_shares
from iosvd.budget import Budget
from iosvd.models.sites import layer_and_role
from iosvd.types import Spectrum


class Counted(Enum):
    """The share that l_i / Σ l divides: of the removed parameters, or of the kept ones."""

    removed = "removed"
    kept = "kept"


@dataclass(frozen=True)
class TypeGrouped(Allocation):
    """ratio_i = len · ratio · l_i / Σ l with l_i = 1 / log(loss_i), by type of weight (METHODS 5).

    loss_i is the predicted truncation loss under a uniform ratio, ‖(W − W_k) X‖_F over the whole
    calibration set. The paper's ratio is one of compression, so that a weight with a larger loss
    loses less (`removed`); read as a maintenance ratio the rule is `kept`, and a larger loss keeps
    less. Losses of few tokens may be too small for the logarithm: it is taken to be 1 at least.
    """

    counted: Counted = Counted.removed

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        uniform = ranks_for_shares(dict.fromkeys(budget.shapes, budget.ratio), budget)
        inverse = {
            site: 1 / max(1.0, math.log(max(1.0, _loss(spectra[site], rank, objective.tokens))))
            for site, rank in uniform.items()
        }
        shares = {}
        for group in _by_role(list(spectra)):
            total = sum(inverse[site] for site in group)
            for site in group:
                relative = len(group) * inverse[site] / total
                kept = self.counted is Counted.kept
                share = budget.ratio if kept else 1 - budget.ratio
                shares[site] = share * relative if kept else 1 - share * relative
        return ranks_for_shares(shares, budget)


def _loss(spectrum: Spectrum, rank: int, tokens: int) -> float:
    return math.sqrt(tokens * float(spectrum.sigma[rank:].square().sum()))


def _by_role(sites: list[str]) -> Iterator[list[str]]:
    roles = {site: layer_and_role(site)[1] for site in sites}
    for role in dict.fromkeys(roles.values()):
        yield [site for site in sites if roles[site] == role]
