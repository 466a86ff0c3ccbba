"""DipSVD's allocation: one ratio for each layer (arXiv 2506.20353)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from iosvd.allocation.base import Allocation
from iosvd.allocation.objective import CalibrationObjective
from iosvd.allocation.search import best_shares
from iosvd.allocation.shares import ranks_for_shares
from iosvd.budget import Budget
from iosvd.errors import ConfigError, check_at_least
from iosvd.models.sites import layer_and_role
from iosvd.statistics.needs import Needs
from iosvd.types import Spectrum

Layers = dict[int, list[str]]
_ROUNDS = 25  # Of scaling and clipping; the public code's.


class Chosen(Enum):
    """Rules that choose the layers' ratios."""

    heuristic = "heuristic"
    search = "search"


@dataclass(frozen=True)
class LayerImportance(Allocation):
    """Important layers keep more: Fisher sensitivity^β × effective rank^(1−β), or a search.

    Sensitivity is the root of the Fisher's trace over the norm of the weight, summed over a layer's
    sites; the effective rank is the share of the whitened singular values that make up 95 % of
    their sum. Both are scaled to [0, 1] over the layers; ratios lie within `spread` of the whole
    one and are then scaled to meet it. β, the spread and the 95 % are the public code's. It takes
    the effective rank of the layers' outputs, and inverts both measures, so that important layers
    keep less, which the paper's text says the opposite of; this is the text (`inverted` is the
    code). It also divides sensitivities by their sum within four segments of layers (`segments`)
    and clips the layers' ratios (`clip`).

    The search minimises the calibration loss over the same interval by a Bayesian optimiser (the
    paper's: GPyOpt, no longer maintained; here Optuna), starting from the heuristic.
    """

    chosen: Chosen = Chosen.heuristic
    beta: float = 0.3
    spread: float = 0.25
    energy: float = 0.95  # Of the sum of σ that the effective rank covers.
    inverted: bool = False
    segments: int = 1  # Of equal depth, within which sensitivities are shares of their sum.
    clip: list[float] | None = None  # The least and the greatest ratio of a layer.
    trials: int = 50  # Of the search.
    windows: int = 8  # Calibration windows of a trial; 0: all.
    seed: int = 0  # Of the search.

    def __post_init__(self) -> None:
        check_at_least(0, beta=self.beta, spread=self.spread, windows=self.windows)
        check_at_least(1, trials=self.trials, segments=self.segments)
        if self.clip is not None and (
            len(self.clip) != 2 or not 0 <= self.clip[0] < self.clip[1] <= 1
        ):
            raise ConfigError(f"clip={self.clip} is no range [least, greatest] within [0, 1]")
        if self.beta > 1 or not 0 < self.energy <= 1 or self.spread >= 1:
            raise ConfigError(
                f"beta={self.beta:g}, energy={self.energy:g}, spread={self.spread:g}: beta and"
                " energy are at most 1, spread is below 1"
            )

    @property
    def needs(self) -> Needs:
        return Needs(fisher_rows=True)

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("optuna",) if self.chosen is Chosen.search else ()

    @property
    def trial_windows(self) -> int | None:
        return self.windows if self.chosen is Chosen.search else None

    def __call__(
        self, spectra: Mapping[str, Spectrum], budget: Budget, objective: CalibrationObjective
    ) -> dict[str, int]:
        layers: Layers = {}
        for site in spectra:
            layers.setdefault(layer_and_role(site)[0], []).append(site)
        wanted = self._heuristic(layers, spectra)

        def ranks(offsets: list[float]) -> dict[str, int]:
            return ranks_for_shares(_shares(offsets, layers, budget, self.clip), budget)

        if self.chosen is Chosen.heuristic:
            return ranks(wanted)
        found = best_shares(
            lambda offsets: objective.loss(ranks(offsets), self.windows),
            start=wanted,
            spread=self.spread,
            trials=self.trials,
            seed=self.seed,
        )
        return ranks(found)

    def _heuristic(self, layers: Layers, spectra: Mapping[str, Spectrum]) -> list[float]:
        """Offsets of the layers' ratios, within ± spread."""
        sensitivity = [sum(_sensitivity(spectra[site]) for site in s) for s in layers.values()]
        rank = [
            sum(_effective_rank(spectra[site], self.energy) for site in s) / len(s)
            for s in layers.values()
        ]
        sensitivity = _shares_of_segments(sensitivity, self.segments)
        if self.inverted:
            sensitivity, rank = [1 / s if s > 0 else 0.0 for s in sensitivity], [-r for r in rank]
        pairs = zip(_unit(sensitivity), _unit(rank), strict=True)
        importance = _unit([s**self.beta * r ** (1 - self.beta) for s, r in pairs])
        return [self.spread * (2 * value - 1) for value in importance]


def _shares(
    offsets: list[float], layers: Layers, budget: Budget, clip: list[float] | None
) -> dict[str, float]:
    """Shares of the sites, scaled so that together they are the budget's, and clipped."""
    sizes = [sum(budget.shapes[s].counted_entries for s in sites) for sites in layers.values()]
    ratios = [max(0.0, budget.ratio + offset) for offset in offsets]
    for _ in range(_ROUNDS if clip else 1):  # What is clipped, the others make up for.
        mean = sum(r * size for r, size in zip(ratios, sizes, strict=True)) / sum(sizes)
        scale = budget.ratio / mean if mean > 0 else 1.0
        ratios = [scale * ratio for ratio in ratios]
        if clip:
            ratios = [min(max(ratio, clip[0]), clip[1]) for ratio in ratios]
    pairs = zip(ratios, layers.values(), strict=True)
    return {site: ratio for ratio, sites in pairs for site in sites}


def _shares_of_segments(values: list[float], segments: int) -> list[float]:
    """Divide each value by the sum of its segment of depth."""
    ends = [len(values) * i // segments for i in range(segments + 1)]
    parts = [values[first:last] for first, last in pairwise(ends)]
    return [value / (sum(part) or 1.0) for part in parts for value in part]


def _sensitivity(spectrum: Spectrum) -> float:
    if spectrum.fisher_norm is None:
        raise ConfigError(
            "a spectrum has no fisher_norm; factorize with the allocation that needs it"
        )
    return spectrum.fisher_norm


def _effective_rank(spectrum: Spectrum, energy: float) -> float:
    covered = spectrum.sigma.cumsum(0) / spectrum.sigma.sum()
    return float((covered < energy).sum() + 1) / len(covered)


def _unit(values: list[float]) -> list[float]:
    """Scale to [0, 1]; where all are equal, to one half."""
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.5 for v in values]
