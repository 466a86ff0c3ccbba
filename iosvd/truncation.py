"""From ranks to truncated sites, and what a quantisation wants to know of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from iosvd.budget import Budget
from iosvd.factorization import truncate
from iosvd.plan import dropped_energy
from iosvd.quantization.base import Quantization, Site
from iosvd.rows import half_dtype
from iosvd.statistics import collect
from iosvd.types import Needs, Spectrum

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def truncated_sites(
    ranks: Mapping[str, int],
    sites: Mapping[str, nn.Linear],
    spectra: Mapping[str, Spectrum],
    budget: Budget,
) -> dict[str, Site]:
    """Truncate the sites that ranks factorise; the factors are copies."""
    factorised = budget.factorised(ranks)
    return {
        name: Site(
            name=name,
            weight=layer.weight,
            factors=truncate(spectra[name], factorised[name]) if name in factorised else None,
            output_diagonal=spectra[name].output_diagonal,
            input_diagonal=spectra[name].input_diagonal,
        )
        for name, layer in sites.items()
    }


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
        truncated = truncated_sites(ranks, sites, spectra, budget)
        rounding = quantization.predicted_loss(truncated, budget.limit, halves)
        dropped = dropped_energy(ranks, spectra, budget) / 2
        log.info("predicted loss: %.4g by truncation, %.4g by rounding", dropped, rounding)
        return dropped + rounding

    return min(candidates, key=loss)


def with_gradient(
    truncated: Mapping[str, Site],
    model: PreTrainedModel,
    tokens: Tensor,
    needs: Needs,
    groups: Sequence[Mapping[str, nn.Linear]],
    batch_size: int,
) -> dict[str, Site]:
    """Add the gradient of the calibration loss at what the model computes now, in main memory.

    Args:
        truncated: all sites.
        model: with the truncated sites in place.
        tokens: calibration windows (windows, length); those that the gradient needs are used.
        needs: how many that are.
        groups: the sites whose gradients are collected in one pass.
        batch_size: windows per forward pass.
    """
    gradients: dict[str, Tensor] = {}
    for group in groups:
        layers = {name: model.get_submodule(name) for name in group}
        found = collect(model, tokens[: needs.gradient_windows], layers, needs, batch_size)
        gradients |= {name: found[name].need("gradient").cpu() for name in group}
    return {name: replace(site, gradient=gradients[name]) for name, site in truncated.items()}
