"""QSVD's global score: how strongly each window's loss depends on each component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from iosvd.allocation.base import Allocation
from iosvd.allocation.greedy import drop_cheapest, per_bit
from iosvd.allocation.objective import CalibrationObjective
from iosvd.budget import Budget
from iosvd.errors import NumericalError, check_at_least
from iosvd.system.progress import track
from iosvd.types import Spectrum


@dataclass(frozen=True)
class ComponentImportance(Allocation):
    """Drop the globally smallest |σ_i| √E_s[(u_iᵀ G_s v_i)²], G_s a window's gradient (METHODS 12).

    One backward pass for each window. Components of layers of different shapes compare by the bits
    that they cost; QSVD has one shape only. Those above break-even are dropped first: a site that
    keeps them is dense.
    """

    windows: int = 0  # The first calibration windows; 0: all.

    def __post_init__(self) -> None:
        check_at_least(0, windows=self.windows)

    @property
    def trial_windows(self) -> int | None:
        return self.windows

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        # Without a store spectra end there; the result must not depend on the store.
        counts = {
            site: min(len(spectrum.right), budget.costs[site].break_even_rank)
            for site, spectrum in spectra.items()
        }
        squares = {site: torch.zeros(len(spectrum.sigma)) for site, spectrum in spectra.items()}
        number = min(self.windows or objective.windows, objective.windows)
        for window in track(range(number), number, "component importance", "window"):
            found = objective.component_derivatives(counts, torch.tensor([window]))
            for site, derivatives in found.items():
                squares[site][: len(derivatives)] += derivatives.square()
        for site, total in squares.items():
            if not torch.isfinite(total).all():
                raise NumericalError(
                    f"the gradients of the components of {site} are not finite; try"
                    " model.dtype=float32 or bfloat16"
                )
        scores = {site: (total / number).sqrt() for site, total in squares.items()}
        return drop_cheapest(per_bit(scores, budget), budget)
