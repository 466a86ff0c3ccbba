"""Dobi-SVD: truncation positions learned by gradient descent (arXiv 2502.02723)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from iosvd.allocation.base import Allocation
from iosvd.allocation.objective import CalibrationObjective
from iosvd.allocation.shares import ranks_for_shares
from iosvd.budget import ENTRY_BITS, Budget
from iosvd.errors import NumericalError, check_at_least
from iosvd.system.progress import track
from iosvd.types import Spectrum


@dataclass(frozen=True)
class Learned(Allocation):
    """Train a real-valued rank k of every site on the calibration loss, under a budget penalty.

    Component i is multiplied by ½ tanh(β (k − i)) + ½, so that the loss has a derivative in k, and
    the loss is that of the next tokens plus penalty · |bits / budget − 1|. Positions start at the
    uniform ranks; learned ones are rounded to ranks within the budget.

    The paper truncates activations and rebuilds weights from their principal directions. Those of
    all windows together are eigenvectors of W R Wᵀ, and projecting on them is the truncation in the
    input metric: so it is `whitening=input` with these ranks. The public code does otherwise: its
    incremental PCA sees each sample's unit right singular vectors, behind the truncated prefix.

    The public trainer takes the perplexity as loss (`of_perplexity`), β = 10, Adam from 5 to 4 rank
    units along a cosine, 20 epochs of 256 samples, and 200 · |ratio − target|, which is a penalty
    of 200 · target here. The defaults were chosen here, for far fewer steps.
    """

    steps: int = 60
    batch_windows: int = 8  # Per step.
    learning_rate: float = 0.03  # Of Adam, for k in units of the full rank.
    last_rate: float = 1.0  # Share of the rate at the end of its cosine.
    sharpness: float = 0.2  # β, per component.
    penalty: float = 10.0  # In units of the loss, for a budget exceeded by 100 %.
    of_perplexity: bool = False  # The loss is exp of nats per token.
    seed: int = 0  # Of the order of the windows.

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, batch_windows=self.batch_windows)
        check_at_least(0, learning_rate=self.learning_rate, sharpness=self.sharpness)
        check_at_least(0, penalty=self.penalty, last_rate=self.last_rate)

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        start = ranks_for_shares(dict.fromkeys(budget.shapes, budget.ratio), budget)
        full = {site: shape.full_rank for site, shape in budget.shapes.items()}
        places = torch.tensor([start[site] / full[site] for site in spectra], requires_grad=True)
        optimizer = torch.optim.Adam([places], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.steps, self.last_rate * self.learning_rate
        )
        # Without a store spectra end there; the result must not depend on the store.
        counts = {
            site: min(len(spectrum.right), budget.costs[site].break_even_rank)
            for site, spectrum in spectra.items()
        }
        generator = torch.Generator().manual_seed(self.seed)
        for _ in track(range(self.steps), self.steps, "truncation positions", "step"):
            chosen = torch.randperm(objective.windows, generator=generator)[: self.batch_windows]
            ranks = {site: places[i] * full[site] for i, site in enumerate(spectra)}
            gates = {site: self._gate(ranks[site], n) for site, n in counts.items() if n}
            kept = torch.stack([_bits(ranks[site], site, budget) for site in spectra]).sum()
            excess = (kept / budget.limit - 1).abs()
            nats = objective.gated_loss(gates, chosen)
            loss = (nats.exp() if self.of_perplexity else nats) + self.penalty * excess
            if not torch.isfinite(loss):
                raise NumericalError(
                    "the loss of the learned ranks is not finite; lower allocation.learning_rate"
                )
            optimizer.zero_grad()
            torch.autograd.backward(loss, inputs=[places])
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                places.clamp_(0, 1)
        learned = dict(zip(spectra, places.tolist(), strict=True))
        shares = {site: _share(learned[site] * full[site], site, budget) for site in spectra}
        return ranks_for_shares(shares, budget)

    def _gate(self, rank: Tensor, components: int) -> Tensor:
        """Return ½ tanh(β (k − i)) + ½ of every component, counted from their middles."""
        middles = torch.arange(components) + 0.5
        return 0.5 * torch.tanh(self.sharpness * (rank - middles)) + 0.5


def _bits(rank: Tensor, site: str, budget: Budget) -> Tensor:
    cost = budget.costs[site]
    return (cost.fixed + rank * cost.component).clamp_max(cost.dense)


def _share(rank: float, site: str, budget: Budget) -> float:
    cost = budget.costs[site]
    bits = min(cost.dense, cost.fixed + rank * cost.component)
    return bits / (ENTRY_BITS * budget.shapes[site].counted_entries)
