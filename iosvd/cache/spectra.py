"""The spectra of all sites, computed in groups that fit the memory, or read from the cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from iosvd.budget import SiteCost
from iosvd.cache.calibration import Calibration
from iosvd.cache.keys import SpectrumKeys
from iosvd.cache.statistics import CachedStatistics, Collected
from iosvd.cache.store import Entry, Key, Store
from iosvd.factorization import Factorization
from iosvd.scoring import with_fisher_norm, with_loss_change
from iosvd.statistics.memory import statistics_bytes
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.system.logs import of_stage
from iosvd.system.machine import release_memory
from iosvd.system.progress import track
from iosvd.system.timing import Stage, StageClock, measured
from iosvd.types import Spectrum
from iosvd.whitening import Whitening

log = logging.getLogger(__name__)
_TENSORS = ("right", "sigma", "left_energy", "right_energy", "output_diagonal", "input_diagonal")
_NUMBERS = ("damping_output", "damping_input")
Place = tuple[torch.device, torch.dtype]  # Of a factorisation.
Found = dict[tuple[str, str], Entry]  # By kind, spectrum or score, and site.


@dataclass(frozen=True)
class Factorized:
    """The spectra of all sites and what they cost; they serve every ratio."""

    spectra: Mapping[str, Spectrum]
    stages: Mapping[str, Stage]  # Costs, also of what an earlier run computed.
    computed: frozenset[str] = frozenset()  # Stages that were computed now, in whole or in part.


@dataclass(frozen=True)
class SpectraOf:
    """How a method computes the spectra of sites and scores their components."""

    whitening: Whitening
    scored: Needs  # Statistics that the allocation reads.
    costs: Mapping[str, SiteCost]  # Of every site.
    factorization: Factorization

    def __call__(self, calibration: Calibration) -> Factorized:
        """Return the spectra of all sites, scored as the allocation asks."""
        wanted, locks = self._keys(calibration)
        found: Found = {}
        store = calibration.store
        _load(store, wanted, found)
        computed: set[str] = set()
        if len(found) < len(wanted):
            with store.locked(locks):
                _load(store, wanted, found)  # Others may have computed them meanwhile.
                computed = self._compute(CachedStatistics(calibration), wanted, found)
        clock = StageClock()
        spectra = {name: _scored(name, found) for name in calibration.sites}
        for entry in found.values():
            seconds, peak = entry.numbers["statistics_seconds"], entry.numbers["statistics_peak"]
            clock.add("statistics", Stage(seconds or 0.0, int(peak or 0)))
            clock.add("factorization", entry.cost)
        return Factorized(spectra, clock.stages, frozenset(computed))

    def _keys(self, calibration: Calibration) -> tuple[dict[tuple[str, str], Key], list[Key]]:
        """Return the keys of all entries, and those to lock while they are computed."""
        keys = SpectrumKeys(calibration.keys, self.whitening, self.factorization)
        wanted = {("spectrum", name): keys.spectrum(name) for name in calibration.sites}
        if self.scored == Needs():
            return wanted, [keys.spectrum()]
        wanted |= {("score", name): keys.score(self.scored, name) for name in calibration.sites}
        return wanted, [keys.spectrum(), keys.score(self.scored)]

    def _compute(
        self, cached: CachedStatistics, wanted: Mapping[tuple[str, str], Key], found: Found
    ) -> set[str]:
        """Compute what is missing, and add it to `found`; return the stages that took."""
        sites, store = cached.calibration.sites, cached.calibration.store
        stages: set[str] = set()
        lacking = {
            kind: {n for k, n in wanted if k == kind and (k, n) not in found} for kind, _ in wanted
        }
        todo = [name for name in sites if any(name in names for names in lacking.values())]
        needs = self.scored | (self.whitening.needs if lacking["spectrum"] else Needs())
        for group in passes_over(cached, todo, needs):
            collected = cached(group, needs)
            stages |= {"factorization", *(["statistics"] if collected.computed else [])}
            with of_stage("factorization"):
                log.info("%d sites", len(group))
            for name in track(group, len(group), "factorization", "site"):
                place = (cached.calibration.device_of(name), self.factorization.precision.dtype)
                if name in lacking["spectrum"]:
                    entry = self._spectrum(sites[name], collected, name, place)
                    found["spectrum", name] = store.put(wanted["spectrum", name], entry)
                if name in lacking.get("score", ()):
                    kept = _spectrum_of(found["spectrum", name])
                    entry = self._score(sites[name], collected, name, kept, place)
                    found["score", name] = store.put(wanted["score", name], entry)
                if not store.keeps:
                    found["spectrum", name] = self._cut(found["spectrum", name], name)
                del collected.statistics[name]
            del collected
            release_memory()  # For the next pass, or for what comes after.
        return stages

    def _spectrum(
        self,
        site: nn.Linear,
        collected: Collected,
        name: str,
        place: Place,
    ) -> Entry:
        """Whiten and factorise one site; the spectrum is kept where the weight is."""
        home = site.weight.device
        with measured() as took:
            statistics = collected.statistics[name].to(*place)
            weight = site.weight.to(place[0])
            spectrum = self.factorization(weight, self.whitening(statistics), name)
            keep = torch.promote_types(site.weight.dtype, torch.float32)
            spectrum = spectrum.head(len(spectrum.sigma), keep)
        tensors = {field: getattr(spectrum, field).to(home) for field in _TENSORS}
        # Transposed, so that the first components are contiguous in the file.
        tensors["left_transposed"] = spectrum.left.T.contiguous().to(home)
        numbers = {field: getattr(spectrum, field) for field in _NUMBERS}
        cost = collected.cost(name, self.whitening.needs.parts())
        return Entry(tensors, took(), {**numbers, **_cost_of_statistics(cost)})

    def _score(
        self,
        site: nn.Linear,
        collected: Collected,
        name: str,
        kept: Spectrum,
        place: Place,
    ) -> Entry:
        """Score one site's spectrum as stored, so that every run sees the same rounding."""
        with measured() as took:
            statistics = collected.statistics[name].to(*place)
            tensors, numbers = self._scores(site, statistics, kept)
        already = self.whitening.needs.parts()
        apart = [part for part in self.scored.parts() if part not in already]
        cost = collected.cost(name, apart)
        return Entry(tensors, took(), {**numbers, **_cost_of_statistics(cost)})

    def _scores(
        self, site: nn.Linear, statistics: SiteStatistics, spectrum: Spectrum
    ) -> tuple[dict[str, Tensor], dict[str, float | None]]:
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float | None] = {}
        if self.scored.gradient_windows:
            gradient = statistics.need("gradient")
            left, right = spectrum.left.to(gradient), spectrum.right.to(gradient)
            change = with_loss_change(
                replace(spectrum, left=left, right=right), gradient
            ).loss_change
            assert change is not None
            tensors["loss_change"] = change.cpu()
        if self.scored.fisher_rows:
            rows = statistics.need("fisher_rows")
            numbers["fisher_norm"] = with_fisher_norm(spectrum, site.weight, rows).fisher_norm
        return tensors, numbers

    def _cut(self, entry: Entry, site: str) -> Entry:
        """Drop components above the break-even rank; a store maps its files instead."""
        rank = self.costs[site].break_even_rank
        # Copies: a view would keep the whole matrix.
        cut = {name: entry.tensors[name][:rank].clone() for name in ("left_transposed", "right")}
        return replace(entry, tensors={**entry.tensors, **cut})


def without_components(sites: Mapping[str, nn.Linear]) -> Factorized:
    """Return spectra without components for sites that all stay dense."""
    nothing = torch.zeros(0)
    return Factorized(
        spectra={
            name: Spectrum(
                left=torch.zeros(site.out_features, 0),
                right=torch.zeros(0, site.in_features),
                sigma=nothing,
                left_energy=nothing,
                right_energy=nothing,
                output_diagonal=torch.ones(site.out_features),
                input_diagonal=torch.ones(site.in_features),
                damping_output=0.0,
                damping_input=0.0,
            )
            for name, site in sites.items()
        },
        stages={},
    )


def passes_over(cached: CachedStatistics, names: Iterable[str], needs: Needs) -> list[list[str]]:
    """Divide sites into those of each pass over the calibration set; log how many passes."""
    calibration = cached.calibration
    groups, limit = cached.groups(names, needs), calibration.memory.limit_bytes
    if needs == Needs() or not groups:
        return groups
    sums = [{name: calibration.shapes[name] for name in group} for group in groups]
    largest = max(statistics_bytes(group, needs, calibration.shared_inputs) for group in sums)
    log.info(
        "statistics of %d sites: %d pass(es), sums of at most %.1f MiB",
        sum(map(len, groups)),
        len(groups),
        largest / 2**20,
    )
    if largest > limit:
        log.warning(
            "the sums of one site take %.2f GiB, more than runtime.memory_gib leaves beside weights"
            " and activations; raise it, lower runtime.batch_tokens, or set"
            " runtime.metrics_on_cpu=true",
            largest / 2**30,
        )
    return groups


def _load(store: Store, wanted: Mapping[tuple[str, str], Key], found: Found) -> None:
    for what, key in wanted.items():
        if what not in found and (entry := store.get(key)) is not None:
            found[what] = entry


def _spectrum_of(entry: Entry) -> Spectrum:
    tensors, numbers = dict(entry.tensors), entry.numbers
    left = tensors.pop("left_transposed").T
    damping = {field: float(numbers[field] or 0.0) for field in _NUMBERS}
    return Spectrum(left=left, **tensors, **damping)  # type: ignore[arg-type]


def _scored(name: str, found: Found) -> Spectrum:
    spectrum = _spectrum_of(found["spectrum", name])
    if ("score", name) not in found:
        return spectrum
    score = found["score", name]
    return replace(
        spectrum,
        loss_change=score.tensors.get("loss_change"),
        fisher_norm=score.numbers.get("fisher_norm"),
    )


def _cost_of_statistics(cost: Stage) -> dict[str, float]:
    return {"statistics_seconds": cost.seconds, "statistics_peak": float(cost.peak_bytes)}
