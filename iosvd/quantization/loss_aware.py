"""Int8 for the rows that matter least (IO-SVD+, arXiv 2605.15626, Figure 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch

from iosvd.budget import Budget, Shape, SiteCost
from iosvd.errors import BudgetError, ConfigError, check_at_least
from iosvd.layers.rows import restore, store_rows
from iosvd.quantization.axis import Axis
from iosvd.quantization.base import Quantization
from iosvd.quantization.scores import Score, row_scores
from iosvd.quantization.selection import ScoredRows, choose_int8
from iosvd.quantization.stored import store_site
from iosvd.statistics.needs import ALL_WINDOWS
from iosvd.system.progress import track
from iosvd.types import Matrix, Site, Stored

SEARCHED = 6  # Rank budgets that a search compares.


class RankBudget(Enum):
    """The share ρ' of the parameters that the SVD keeps before rows are rounded (METHODS 6).

    double: min(1, 2ρ), as much as fits with all rows in int8. fixed: `rank_ratio`. search: the best
    of six from ρ to min(1, 2ρ) by predicted loss.
    """

    double = "double"
    fixed = "fixed"
    search = "search"


@dataclass(frozen=True)
class LossAwareRemap(Quantization):
    """Truncate, score every row, and round the rows with the lowest scores until the bytes fit.

    Choices that the paper leaves open follow results/tables/rounding-*.md (`make rounding`):
    held-out text of babyllama-1.0M and books-6M at 0.8, 0.6 and 0.4.

    * `rank_budget`: double is best everywhere and what search chooses. KL from the dense model with
      it, and with the next smaller budget tried (0.94, 0.89 and 0.69 of the parameters):
      0.00004, 0.0001, 0.014 against 0.0002, 0.0014, 0.12 on babyllama;
      0.00001, 0.00003, 0.008 against 0.0008, 0.0022, 0.018 on books.
    * `axis`: components lose least, KL 0.0143 against 0.0152 and 0.0161 at 0.4 on babyllama, 0.0083
      against 0.0084 and 0.0086 on books.
    * `score`: signed gives the lowest perplexity, below the dense model's at 0.8 and 0.6 as the
      published 5.59 is below 5.68, and is the only one far from random rows there (20 standard
      deviations on books); rounding one row is small enough for its derivative to be right, Pearson
      1.00 with what was measured. On texts it was not calibrated with (PTB, C4) it is no worse than
      the dense model. But it moves further from it than the others do: KL is least with
      second_order, a third or less of that of random rows at 0.8, which needs no gradient.
    """

    score: Score = Score.signed
    axis: Axis = Axis.component
    rank_budget: RankBudget = RankBudget.double
    rank_ratio: float = 0.0  # ρ' of rank_budget=fixed.
    windows: int = 0  # Calibration windows of the gradient; 0: all of them.
    seed: int = 0  # Of score=random.

    def __post_init__(self) -> None:
        check_at_least(0, windows=self.windows)
        fixed = self.rank_budget is RankBudget.fixed
        if fixed != (self.rank_ratio > 0) or self.rank_ratio > 1:
            raise ConfigError(
                f"rank_ratio={self.rank_ratio:g} with rank_budget={self.rank_budget.value}:"
                " rank_budget=fixed needs a rank_ratio in (0, 1], the others need 0"
            )

    @property
    def gradient_windows(self) -> int:
        return (self.windows or ALL_WINDOWS) if self.score.needs_gradient else 0

    def cost(self, shape: Shape) -> SiteCost:
        return self.axis.int8_cost(shape)

    def rank_budgets(self, budget: Budget) -> list[Budget]:
        """Return budgets for ranks whose rows are all in int8: the share ρ' of the dense sites."""
        if self.rank_budget is RankBudget.double:
            return [budget]
        whole = sum(cost.dense for cost in budget.costs.values()) / budget.total
        most = min(1.0, budget.ratio / whole)
        if self.rank_budget is RankBudget.search:
            step = max(0.0, most - budget.ratio) / (SEARCHED - 1)
            shares = [budget.ratio + step * i for i in range(SEARCHED - 1)]
            floor = budget.smallest_ratio  # The smallest may be infeasible.
            feasible = [share for share in shares if floor < share * whole < budget.ratio]
            return [*(replace(budget, ratio=share * whole) for share in feasible), budget]
        if self.rank_ratio > most:
            raise BudgetError(
                f"quantization.rank_ratio={self.rank_ratio:g} takes {self.rank_ratio * whole:.4g}"
                f" of the 16-bit model with every row in int8, more than ratio {budget.ratio:g};"
                f" lower rank_ratio to {math.floor(1e4 * most) / 1e4:g} or raise ratio"
            )
        try:
            return [replace(budget, ratio=self.rank_ratio * whole)]
        except BudgetError:
            raise BudgetError(
                f"quantization.rank_ratio={self.rank_ratio:g} is below what rank 1 at every site"
                " needs; raise it"
            ) from None

    def predicted_loss(self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype) -> float:
        # Ranks are chosen before there is a gradient.
        by_metrics = replace(self, score=Score.second_order)
        return Quantization.predicted_loss(by_metrics, sites, limit, dtype)

    def __call__(
        self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        int8 = choose_int8(self._scored(sites), limit)
        stored: dict[str, Stored] = {}
        for name, site in track(sites.items(), len(sites), "int8 rows", "site"):
            mine = {key: rows for (owner, key), rows in int8.items() if owner == name}
            by_output = {key: self.axis.by_output(key, site.factors is None) for key in mine}
            stored[name] = store_site(site, mine, by_output, dtype)
        return stored

    def _scored(self, sites: Mapping[str, Site]) -> dict[tuple[str, str], ScoredRows]:
        scored: dict[tuple[str, str], ScoredRows] = {}
        for name, site in track(sites.items(), len(sites), "row scores", "site"):
            for key, matrix in site.matrices().items():
                by_output = self.axis.by_output(key, site.factors is None)
                seed = self.seed * 1_000_003 + len(scored)  # A different one for each matrix.
                scored[name, key] = self._score(matrix, by_output, name, seed)
        return scored

    def _score(self, matrix: Matrix, by_output: bool, what: str, seed: int) -> ScoredRows:
        rows, columns = matrix.values.shape if by_output else matrix.values.shape[::-1]
        everything = torch.ones(rows, dtype=torch.bool)
        rounded = store_rows(matrix.values, everything, torch.float16, by_output, what)
        error = restore(*rounded).to(matrix.values) - matrix.values
        return ScoredRows(columns, row_scores(matrix, error, by_output, self.score, seed))
