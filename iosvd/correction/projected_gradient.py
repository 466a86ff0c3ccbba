"""ZS-SVD's truncate-correct-truncate (2602.02848)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from iosvd.allocation import Trial
from iosvd.correction.base import Corrected, Correction, Given
from iosvd.errors import ConfigError, check_at_least
from iosvd.layers.replacement import replace_, truncated_weights
from iosvd.scoring import with_loss_change
from iosvd.statistics.needs import ALL_WINDOWS, Needs
from iosvd.system.progress import track
from iosvd.truncation import TruncatedSites, with_gradient
from iosvd.types import Spectrum


@dataclass(frozen=True)
class ProjectedGradient(Correction):
    """Move the truncated weights along the loss's gradient, as far as W lies there; truncate again.

    With g the gradient of the calibration loss at the truncated weight W_k and ΔW = W − W_k, a
    round makes W_k + (⟨g, ΔW⟩ / ⟨g, g⟩) g and takes its spectrum in the same metrics (METHODS 7).
    The paper keeps the ranks; its public code plans them anew in each round, scored by that g: here
    under the budget itself, whatever budget of ranks the quantisation has chosen.
    A site that is planned to stay dense stays W.
    """

    rounds: int = 1  # The paper's tables have 1, 5 and 10.
    replan: bool = True  # As the public code; False: the ranks of the first truncation.
    gradient_windows: int = 0  # Calibration windows of g; 0: all of them.

    def __post_init__(self) -> None:
        check_at_least(1, rounds=self.rounds)
        check_at_least(0, gradient_windows=self.gradient_windows)

    @property
    def needs_metrics(self) -> bool:
        return True

    def __call__(self, given: Given) -> Corrected:
        sites = given.sites
        for _ in track(range(self.rounds), self.rounds, "projected gradient", "round"):
            spectra = self._moved(given, sites)
            ranks = sites.ranks
            if self.replan:
                ranks = given.allocation(spectra, sites.budget, _NoTrial())
            sites = TruncatedSites(ranks, sites.sites, spectra, sites.budget)
        replace_(given.model, sites)
        return Corrected(sites, sites.ranks)

    def _moved(self, given: Given, sites: TruncatedSites) -> dict[str, Spectrum]:
        """Return the spectra of the weights that one round moves to."""
        factorised = sites.budget.factorised(sites.ranks)
        asked = Needs(gradient_windows=self.gradient_windows or ALL_WINDOWS)
        with truncated_weights(sites.sites, sites.spectra, factorised):
            gradients = with_gradient(
                sites, given.model, given.tokens, asked, given.batch_size, given.memory
            )
        found = {}
        for name, layer in track(sites.sites.items(), len(sites), "factorization", "site"):
            kind = given.factorization.precision.dtype
            gradient = gradients[name].gradient
            assert gradient is not None
            weight, g = layer.weight.detach().to(kind), gradient.to(layer.weight.device, kind)
            if name in factorised:
                spectrum, rank = sites.spectra[name], factorised[name]
                left, right = spectrum.left[:, :rank].to(weight), spectrum.right[:rank].to(weight)
                weight = moved(weight, left @ right, g)
            statistics = given.statistics[name].to(weight.device, kind)
            spectrum = given.factorization(weight, given.whitening(statistics), name)
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


class _NoTrial(Trial):
    """Stands where allocations measure ranks, which are those of weights that have moved."""

    @property
    def tokens(self) -> int:
        return 0

    @property
    def windows(self) -> int:
        return 0

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> NoReturn:
        self.loss({}, 0)

    def loss(self, ranks: Mapping[str, int], windows: int) -> NoReturn:
        raise ConfigError(
            "correction.replan=true cannot plan with an allocation that measures;"
            " set correction.replan=false"
        )
