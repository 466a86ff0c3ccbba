"""ZS-SVD's truncate-correct-truncate (2602.02848)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from iosvd.allocation import CalibrationObjective
from iosvd.allocation.objective import Predictions
from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.errors import ConfigError, check_at_least
from iosvd.layers.replacement import truncated_weights
from iosvd.scoring import with_loss_change
from iosvd.statistics.needs import ALL_WINDOWS
from iosvd.system.progress import track
from iosvd.truncation import TruncatedSites, with_gradient
from iosvd.types import Spectrum


@dataclass(frozen=True)
class ProjectedGradient(Correction):
    """Move the truncated weights along the loss's gradient, as far as W lies there; truncate again.

    With g the gradient of the calibration loss at the truncated weight W_k and ΔW = W − W_k, a
    round makes W_k + (⟨g, ΔW⟩ / ⟨g, g⟩) g and takes its spectrum in the same metrics (METHODS 7).
    The paper keeps the ranks; its public code plans them anew in each round, scored by that g. Here
    that is done under the budget itself, not under a quantisation's budget of ranks.
    A site that is planned to stay dense stays W.
    """

    rounds: int = 1  # The paper's tables have 1, 5 and 10.
    replan: bool = True  # Like the public code; False: keep the ranks of the first truncation.
    gradient_windows: int = 0  # Calibration windows of g; 0: all of them.

    def __post_init__(self) -> None:
        check_at_least(1, rounds=self.rounds)
        check_at_least(0, gradient_windows=self.gradient_windows)

    @property
    def needs_metrics(self) -> bool:
        return True

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        sites = inputs.sites
        for _ in track(range(self.rounds), self.rounds, "projected gradient", "round"):
            spectra = self._moved(inputs, sites)
            ranks = sites.ranks
            if self.replan:
                ranks = inputs.allocation(spectra, sites.budget, _NoMeasurement())
            sites = TruncatedSites(ranks, sites.sites, spectra, sites.budget)
        return CorrectionResult(sites, sites.ranks)

    def _moved(self, inputs: CorrectionInputs, sites: TruncatedSites) -> dict[str, Spectrum]:
        """Return the spectra of the weights that one round moves to."""
        factorised = sites.budget.factorised(sites.ranks)
        with truncated_weights(sites.sites, sites.spectra, factorised):
            windows = self.gradient_windows or ALL_WINDOWS
            gradients = with_gradient(sites, inputs.calibration, windows)
        found = {}
        for name, layer in track(sites.sites.items(), len(sites), "factorization", "site"):
            gradient = gradients[name].gradient
            assert gradient is not None
            dtype = inputs.factorization.precision.dtype
            weight, g = layer.weight.detach().to(dtype), gradient.to(layer.weight.device, dtype)
            if name in factorised:
                spectrum, rank = sites.spectra[name], factorised[name]
                left, right = spectrum.left[:, :rank].to(weight), spectrum.right[:rank].to(weight)
                weight = moved(weight, left @ right, g)
            statistics = inputs.statistics[name].to(weight.device, dtype)
            spectrum = inputs.factorization(weight, inputs.whitening(statistics), name)
            scored = with_loss_change(spectrum, g)
            kept = sites.budget.costs[name].break_even_rank  # Above it, the site is dense.
            precise = torch.promote_types(layer.weight.dtype, torch.float32)
            found[name] = scored.head(kept, precise)
        return found


def moved(weight: Tensor, truncated: Tensor, gradient: Tensor) -> Tensor:
    """Return W_k + (⟨g, W − W_k⟩ / ⟨g, g⟩) g, all of them (m, n)."""
    square = gradient.square().sum()
    if square == 0:
        return truncated
    return truncated + (gradient * (weight - truncated)).sum() / square * gradient


class _NoMeasurement(CalibrationObjective):
    """Refuses to measure: the dense model's loss says nothing about weights that have moved."""

    @property
    def tokens(self) -> int:
        return 0

    @property
    def windows(self) -> int:
        return 0

    @property
    def length(self) -> int:
        return 0

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> NoReturn:
        self.loss({}, 0)

    def divergence(
        self, ranks: Mapping[str, int], windows: int, predictions: Predictions
    ) -> NoReturn:
        self.loss({}, 0)

    def loss(self, ranks: Mapping[str, int], windows: int) -> NoReturn:
        raise ConfigError(
            "correction.replan=true cannot plan with an allocation that measures;"
            " set correction.replan=false"
        )
