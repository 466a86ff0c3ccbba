"""ZS-SVD's truncate-correct-truncate (2602.02848)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from iosvd.allocation import CalibrationObjective
from iosvd.allocation.objective import Predictions
from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.work import CorrectionWork, PlannedModel
from iosvd.errors import ConfigError, check_at_least
from iosvd.layers.replacement import replaced_weights, truncated_weights
from iosvd.scoring import with_loss_change
from iosvd.statistics.needs import ALL_WINDOWS, Needs, SiteStatistics
from iosvd.statistics.planning import Work
from iosvd.system.progress import track
from iosvd.truncation import TruncatedSites, collect_in_groups, with_gradient
from iosvd.types import Site, Spectrum


@dataclass(frozen=True)
class ProjectedGradient(Correction):
    """Move the truncated weights along the loss's gradient, as far as W lies there; truncate again.

    With g the gradient of the calibration loss at the truncated weight W_k and ΔW = W − W_k, a
    round makes W_k + (⟨g, ΔW⟩ / ⟨g, g⟩) g and takes its spectrum in the same metrics (METHODS 7).
    The paper keeps the ranks; its public code plans them anew in each round. Here that is done
    under the budget itself, not under a quantisation's budget of ranks. With `reprofile`, as in the
    public code, the metrics and the gradient that scores are those of the model that has moved;
    otherwise the metrics are the dense model's and the score is by g.
    A site that is planned to stay dense stays W.
    """

    rounds: int = 1  # The paper's tables have 1, 5 and 10.
    replan: bool = True  # Like the public code; False: keep the ranks of the first truncation.
    reprofile: bool = False
    gradient_windows: int = 0  # Calibration windows of g; 0: all of them.

    def __post_init__(self) -> None:
        check_at_least(1, rounds=self.rounds)
        check_at_least(0, gradient_windows=self.gradient_windows)

    @property
    def needs_metrics(self) -> bool:
        return not self.reprofile

    def work(self, planned: PlannedModel) -> CorrectionWork | None:
        if self.reprofile:  # Whatever the whitening collects.
            return None
        needs = Needs(gradient_windows=self.gradient_windows or ALL_WINDOWS)
        once = planned.shapes.statistics(needs, planned.length)
        passes = Work(self.rounds * once.model, self.rounds * once.sums)
        return CorrectionWork(passes, factorizations=self.rounds)

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
        """Return the scored spectra of the weights that one round moves to."""
        factorised = sites.budget.factorised(sites.ranks)
        with truncated_weights(sites.sites, sites.spectra, factorised):
            windows = self.gradient_windows or ALL_WINDOWS
            gradients = with_gradient(sites, inputs.calibration, windows)

        def weight_of(name: str) -> Tensor:
            dtype, layer = inputs.factorization.precision.dtype, sites.sites[name]
            weight = layer.weight.detach().to(dtype)
            if name not in factorised:
                return weight
            spectrum, rank = sites.spectra[name], factorised[name]
            left, right = spectrum.left[:, :rank].to(weight), spectrum.right[:rank].to(weight)
            return moved(weight, left @ right, _gradient(gradients[name]).to(weight))

        found, work = {}, self._profiled(inputs, sites, gradients, weight_of)
        for statistics, weight in track(work, len(sites), "factorization", "site"):
            name = statistics.site
            statistics = statistics.to(weight.device, weight.dtype)
            spectrum = inputs.factorization(weight, inputs.whitening(statistics), name)
            scored = with_loss_change(spectrum, statistics.need("gradient"))
            kept = sites.budget.costs[name].break_even_rank  # Above it, the site is dense.
            precise = torch.promote_types(sites.sites[name].weight.dtype, torch.float32)
            found[name] = scored.head(kept, precise)
        return {name: found[name] for name in sites}

    def _profiled(
        self,
        inputs: CorrectionInputs,
        sites: TruncatedSites,
        gradients: Mapping[str, Site],
        weight_of: Callable[[str], Tensor],
    ) -> Iterator[tuple[SiteStatistics, Tensor]]:
        """Yield the metrics of every site, the gradient that scores it, and its moved weight."""
        if not self.reprofile:
            for name in sites:
                gradient = _gradient(gradients[name])
                yield replace(inputs.statistics[name], gradient=gradient), weight_of(name)
            return
        needs = inputs.whitening.needs | Needs(
            gradient_windows=self.gradient_windows or ALL_WINDOWS
        )
        with replaced_weights(sites.sites, ((name, weight_of(name)) for name in sites)):
            own = inputs.calibration
            for statistics in collect_in_groups(own, needs, own.shared_inputs):
                weight = sites.sites[statistics.site].weight.detach()
                yield statistics, weight.to(inputs.factorization.precision.dtype)


def _gradient(site: Site) -> Tensor:
    assert site.gradient is not None
    return site.gradient


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

    def component_derivatives(self, counts: Mapping[str, int], chosen: Tensor) -> NoReturn:
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
