"""From ranks to truncated sites, and what a quantisation wants to know of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from iosvd.budget import Budget, Shape
from iosvd.factorization import dropped_energy, truncate
from iosvd.layers.rows import half_dtype
from iosvd.quantization.base import Quantization
from iosvd.statistics.collect import collect
from iosvd.statistics.memory import MemoryUse, groups_within
from iosvd.statistics.needs import Needs
from iosvd.types import Site, Spectrum

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TruncatedSites(Mapping[str, Site]):
    """All sites under some ranks; factors are computed when they are looked at, and not kept."""

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
    """Sites with the gradient of what they multiply by."""

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
    """Return the ranks with the least predicted loss, of truncation and of rounding together."""
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


def with_gradient(
    truncated: Mapping[str, Site],
    model: PreTrainedModel,
    tokens: Tensor,
    needs: Needs,
    batch_size: int,
    memory: MemoryUse,
) -> Mapping[str, Site]:
    """Add the gradient of the calibration loss at what the model computes now, in main memory.

    Args:
        truncated: all sites.
        model: with the truncated sites in place.
        tokens: calibration windows (windows, length); those that the gradient needs are used.
        needs: how many that are.
        batch_size: windows per forward pass.
        memory: what the sums of a pass may take.
    """
    shapes = {name: Shape(*site.weight.shape) for name, site in truncated.items()}
    gradients: dict[str, Tensor] = {}
    # Gradients are of the sites alone: none is shared.
    for group in groups_within(shapes, needs, {name: name for name in shapes}, memory.limit_bytes):
        found = collect(
            model,
            tokens[: needs.gradient_windows],
            {name: model.get_submodule(name) for name in group},
            needs,
            batch_size,
            on_cpu=memory.metrics_on_cpu,
            checkpoint_blocks=memory.checkpoint_blocks,
        )
        gradients |= {name: found[name].need("gradient").cpu() for name in group}
    return _WithGradient(truncated, gradients)
