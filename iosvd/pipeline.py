"""compress(): the whole algorithm on one screen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.allocation import Allocation
from iosvd.budget import Budget, Shape
from iosvd.data import warn_if_few
from iosvd.errors import ModelError
from iosvd.factorization import Factorization
from iosvd.plan import Plan, make_plan
from iosvd.progress import track
from iosvd.quantization import NoQuantization, Quantization
from iosvd.replacement import compressed_layers, replace_, store_
from iosvd.rows import half_dtype
from iosvd.scoring import with_loss_change
from iosvd.sites import SiteSelection, find_sites, in_groups
from iosvd.stages import Stage, StageClock
from iosvd.statistics import collect, statistics_bytes
from iosvd.truncation import best_ranks, truncated_sites, with_gradient
from iosvd.types import Needs, SiteStatistics, Spectrum
from iosvd.whitening import Whitening

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compressed:
    """The compressed model (the one given, changed in place), how it was planned, what it took."""

    model: PreTrainedModel
    plan: Plan
    sigma: Mapping[str, Tensor]  # (min(m, n),) per site: all singular values, dropped ones too.
    stages: Mapping[str, Stage]


def compress(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    ratio: float,
    whitening: Whitening,
    allocation: Allocation,
    quantization: Quantization = NoQuantization(),  # noqa: B008 (frozen)
    factorization: Factorization = Factorization(),  # noqa: B008 (frozen)
    selection: SiteSelection = SiteSelection(),  # noqa: B008 (frozen)
    batch_size: int = 8,
    passes: int = 1,
    statistics: Mapping[str, SiteStatistics] | None = None,
) -> Compressed:
    """Compress a causal language model to a maintenance ratio.

    Args:
        model: changed in place.
        tokens: calibration windows (windows, length).
        ratio: bits kept / 16 bits for every parameter of the target sites, in (0, 1]; without
            quantisation that is the share of the parameters.
        whitening, allocation, quantization: the method.
        factorization: precision and algorithm of the decompositions.
        selection: which layers are targets.
        batch_size: windows per forward pass.
        passes: passes over the calibration set, each for a part of the sites: the statistics take
            so many times less memory, and more time.
        statistics: what `collect` returned for this model, to compress it to several ratios.

    Raises:
        IosvdError: one line that names the cause and the remedy.
    """
    from iosvd.checkpoint import mark_compressed_  # Imports much of transformers.

    if compressed_layers(model):
        raise ModelError("this model is compressed already; start from the dense one")
    clock = StageClock()
    sites = find_sites(model, selection)
    shapes = {name: Shape(*site.weight.shape) for name, site in sites.items()}
    budget = Budget(shapes, ratio, quantization.cost)
    rank_budgets = quantization.rank_budgets(budget)
    needs = whitening.needs | allocation.needs
    groups = in_groups(sites, passes)
    largest = max(statistics_bytes(group, needs) for group in groups)
    log.info("%d sites; statistics take at most %.1f MiB", len(sites), largest / 2**20)
    if needs != Needs():
        warn_if_few(tokens, {name: site.in_features for name, site in sites.items()})
    spectra: dict[str, Spectrum] = {}
    for group in groups:
        with clock.stage("statistics"):
            found = dict(statistics or collect(model, tokens, group, needs, batch_size))
        with clock.stage("factorization"):
            scored = needs.gradient_windows > 0
            spectra |= _spectra(group, found, whitening, factorization, budget, scored)
    with clock.stage("allocation"):
        candidates = [allocation(spectra, rank_budget) for rank_budget in rank_budgets]
        ranks = best_ranks(candidates, sites, spectra, budget, quantization)
        truncated = truncated_sites(ranks, sites, spectra, budget)
    # The factors are copies; from here on only the numbers of the spectra are needed.
    spectra = {name: spectrum.head(0, torch.float32) for name, spectrum in spectra.items()}
    with clock.stage("replacement"):
        replace_(model, {name: s.factors for name, s in truncated.items() if s.factors})
    with clock.stage("quantization"):
        asked = Needs(gradient_windows=quantization.gradient_windows)
        if asked != Needs():
            truncated = with_gradient(truncated, model, tokens, asked, groups, batch_size)
        stored = quantization(truncated, budget.limit, half_dtype(model.dtype))
        store_(model, stored)
    plan = make_plan(ranks, spectra, budget, kl=needs.kl_metric is not None, stored=stored)
    mark_compressed_(model)
    sigma = {site: spectrum.sigma for site, spectrum in spectra.items()}
    return Compressed(model, plan, sigma, clock.stages)


def _spectra(
    sites: Mapping[str, nn.Linear],
    statistics: dict[str, SiteStatistics],
    whitening: Whitening,
    factorization: Factorization,
    budget: Budget,
    scored: bool,
) -> dict[str, Spectrum]:
    """Factorise site by site, freeing each site's statistics; keep the vectors a plan may use."""
    spectra, costs = {}, budget.costs
    for name in track(list(sites), len(sites), "factorization", "site"):
        weight = sites[name].weight
        # Absent only where the caller gave statistics of other sites; `need` then names the site.
        of_site = statistics.pop(name, SiteStatistics(name)).to(factorization.precision.dtype)
        spectrum = factorization(weight, whitening(of_site), name)
        if scored:
            spectrum = with_loss_change(spectrum, of_site.need("gradient"))
        keep = torch.promote_types(weight.dtype, torch.float32)
        spectra[name] = spectrum.head(costs[name].break_even_rank, keep)
    return spectra
