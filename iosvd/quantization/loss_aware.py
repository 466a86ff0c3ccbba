"""Int8 for the rows that matter least (IO-SVD+, arXiv 2605.15626, Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch

from iosvd.allocation.loss_aware import ALL_WINDOWS
from iosvd.budget import Budget, Shape, SiteCost
from iosvd.errors import BudgetError, ConfigError, check_at_least
from iosvd.progress import track
from iosvd.quantization.axis import Axis
from iosvd.quantization.base import Matrix, Quantization, Site, Stored
from iosvd.quantization.scores import Score, row_scores
from iosvd.quantization.selection import ScoredRows, choose_int8
from iosvd.quantization.stored import store_site
from iosvd.rows import restore, store_rows

SEARCHED = 6  # Rank budgets that a search compares.


class RankBudget(Enum):
    """How much the SVD stage keeps before rows are rounded: ρ' of the parameters (METHODS 6).

    double: min(1, 2ρ), as much as fits with all rows in int8. fixed: `rank_ratio`. search: the best
    of six from ρ to min(1, 2ρ) by predicted loss.
    """

    double = "double"
    fixed = "fixed"
    search = "search"


@dataclass(frozen=True)
class LossAwareRemap(Quantization):
    """Truncate, score every row, round those of the lowest scores until the bytes fit."""

    score: Score = Score.absolute
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
        """Return budgets for ranks whose sites are all in int8: the share ρ' of the dense ones."""
        whole = sum(cost.dense for cost in budget.costs.values()) / budget.total
        most = min(1.0, budget.ratio / whole)
        if self.rank_budget is RankBudget.double:
            shares = [most]
        elif self.rank_budget is RankBudget.search:
            least = min(budget.ratio, most)
            shares = [least + (most - least) * i / (SEARCHED - 1) for i in range(SEARCHED)]
        else:
            if self.rank_ratio > most:
                raise BudgetError(
                    f"quantization.rank_ratio={self.rank_ratio:g} takes"
                    f" {self.rank_ratio * whole:.4g} of the 16-bit model with every row in int8,"
                    f" more than ratio {budget.ratio:g}; lower rank_ratio to {most:.4g} or raise"
                    " ratio"
                )
            shares = [self.rank_ratio]
        return [replace(budget, ratio=min(share * whole, budget.ratio)) for share in shares]

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
                seed = self.seed * 1_000_003 + len(scored)  # Another for each matrix.
                scored[name, key] = self._score(matrix, by_output, name, seed)
        return scored

    def _score(self, matrix: Matrix, by_output: bool, what: str, seed: int) -> ScoredRows:
        rows, columns = matrix.values.shape if by_output else matrix.values.shape[::-1]
        everything = torch.ones(rows, dtype=torch.bool)
        rounded = store_rows(matrix.values, everything, torch.float16, by_output, what)
        error = restore(*rounded).to(matrix.values) - matrix.values
        return ScoredRows(columns, row_scores(matrix, error, by_output, self.score, seed))
