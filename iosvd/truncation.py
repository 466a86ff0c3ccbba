"""From ranks to truncated sites, and the gradient that a quantisation reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from iosvd.budget import Budget
from iosvd.cache.calibration import Calibration
from iosvd.factorization import dropped_energy, truncate
from iosvd.layers.rows import half_dtype
from iosvd.quantization.base import Quantization
from iosvd.statistics.collect import collect
from iosvd.statistics.memory import groups_within
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.types import Site, Spectrum

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TruncatedSites(Mapping[str, Site]):
    """All sites under some ranks; factors are computed at every access and not kept."""

    ranks: Mapping[str, int]
    sites: Mapping[str, nn.Linear]
    spectra: Mapping[str, Spectrum]
    budget: Budget

    def __getitem__(self, name: str) -> Site:
        spectrum, rank = self.spectra[name], self.ranks[name]
        return Site(
            name=name,
            weight=self.sites[name].weight,
            factors=truncate(spectrum, rank) if self.budget.is_factorised(name, rank) else None,
            output_diagonal=spectrum.output_diagonal,
            input_diagonal=spectrum.input_diagonal,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


@dataclass(frozen=True)
class _WithGradient(Mapping[str, Site]):
    """Sites with the gradient of the loss with respect to their weights."""

    sites: Mapping[str, Site]
    gradients: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Site:
        return replace(self.sites[name], gradient=self.gradients[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def best_ranks(
    candidates: Sequence[Mapping[str, int]],
    sites: Mapping[str, nn.Linear],
    spectra: Mapping[str, Spectrum],
    budget: Budget,
    quantization: Quantization,
) -> Mapping[str, int]:
    """Return the ranks with the least predicted loss of truncation and rounding together."""
    if len(candidates) == 1:
        return candidates[0]
    halves = half_dtype(next(iter(sites.values())).weight.dtype)

    def loss(ranks: Mapping[str, int]) -> float:
        truncated = TruncatedSites(ranks, sites, spectra, budget)
        rounding = quantization.predicted_loss(
            truncated, budget.limit - budget.bias_bits(ranks), halves
        )
        dropped = dropped_energy(ranks, spectra, budget) / 2
        log.info("predicted loss: %.4g by truncation, %.4g by rounding", dropped, rounding)
        return dropped + rounding

    return min(candidates, key=loss)


def collect_in_groups(
    calibration: Calibration, needs: Needs, shared: Mapping[str, str]
) -> Iterator[SiteStatistics]:
    """Yield the statistics of all sites at the model's current weights, which no cache knows.

    As many sites at a time as memory allows, each with a pass over the calibration windows.

    Args:
        calibration: its model may have truncated layers in place of the sites.
        needs: which statistics.
        shared: each site, and the first site that reads the same tensor.
    """
    own = calibration
    for group in groups_within(own.shapes, needs, shared, own.memory.limit_bytes):
        found = collect(
            own.model,
            own.windows,
            {name: own.model.get_submodule(name) for name in group},
            needs,
            own.batch_size,
            on_cpu=own.memory.metrics_on_cpu,
        )
        for name in group:
            yield found.pop(name)


def with_gradient(
    truncated: Mapping[str, Site], calibration: Calibration, windows: int
) -> Mapping[str, Site]:
    """Add the gradient of the calibration loss at the model's current weights, in main memory.

    Args:
        truncated: all sites.
        calibration: its model has the truncated sites in place.
        windows: the first calibration windows, over which the gradient is a mean.
    """
    unshared = {name: name for name in truncated}  # No two sites share a gradient.
    found = collect_in_groups(calibration, Needs(gradient_windows=windows), unshared)
    gradients = {one.site: one.need("gradient").cpu() for one in found}
    return _WithGradient(truncated, gradients)
