"""compress(): the whole algorithm on one screen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.allocation import Allocation
from iosvd.budget import Budget, Shape
from iosvd.data import warn_if_few
from iosvd.errors import ConfigError, ModelError
from iosvd.factorization import Factorization
from iosvd.plan import Plan, make_plan
from iosvd.progress import track
from iosvd.quantization import NoQuantization, Quantization
from iosvd.replacement import compressed_layers, replace_, store_
from iosvd.rows import half_dtype
from iosvd.scoring import with_fisher_norm, with_loss_change
from iosvd.sites import SiteSelection, find_sites, in_groups
from iosvd.stages import Stage, StageClock
from iosvd.statistics import collect, statistics_bytes
from iosvd.target import budget_for_kl, check_target
from iosvd.trials import CalibrationTrial
from iosvd.truncation import best_ranks, truncated_sites, with_gradient
from iosvd.types import Needs, SiteStatistics, Spectrum
from iosvd.whitening import Whitening, predicts_kl

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factorized:
    """The spectra of all sites, and what they took; they serve every ratio."""

    spectra: Mapping[str, Spectrum]
    stages: Mapping[str, Stage]


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
    ratio: float | None = None,
    target_kl: float | None = None,
    whitening: Whitening,
    allocation: Allocation,
    quantization: Quantization = NoQuantization(),  # noqa: B008 (frozen)
    factorization: Factorization = Factorization(),  # noqa: B008 (frozen)
    selection: SiteSelection = SiteSelection(),  # noqa: B008 (frozen)
    min_rank_fraction: float = 0.0,
    gradient_tokens: Tensor | None = None,
    batch_size: int = 8,
    passes: int = 1,
    factorized: Factorized | None = None,
) -> Compressed:
    """Compress a causal language model to a maintenance ratio, or to a predicted quality.

    Args:
        model: changed in place.
        tokens: calibration windows (windows, length).
        ratio: bits kept / 16 bits for every parameter of the target sites, in (0, 1]; without
            quantisation that is the share of the parameters.
        target_kl: instead of a ratio: the smallest one whose predicted KL divergence, nats per
            token, is within it.
        whitening, allocation, quantization: the method.
        factorization: precision and algorithm of the decompositions.
        selection: which layers are targets.
        min_rank_fraction: of its break-even rank that every site keeps at least.
        gradient_tokens: windows of the loss gradient, which scores; None: the same.
        batch_size: windows per forward pass.
        passes: passes over the calibration set, each for a part of the sites: the statistics take
            so many times less memory, and more time.
        factorized: what `factorize` returned for this model, to compress it to several ratios.

    Raises:
        IosvdError: one line that names the cause and the remedy.
    """
    from iosvd.checkpoint import mark_compressed_  # Imports much of transformers.

    if (ratio is None) == (target_kl is None):
        raise ConfigError("give either a ratio or a target_kl")
    if target_kl is not None:
        check_target(target_kl, whitening, quantization)
    clock = StageClock()
    sites = _sites(model, selection)
    budget = feasible_budget(sites, ratio, quantization, min_rank_fraction)
    rank_budgets = quantization.rank_budgets(budget)
    factorized = factorized or factorize(
        model,
        tokens,
        whitening=whitening,
        allocation=allocation,
        quantization=quantization,
        factorization=factorization,
        selection=selection,
        gradient_tokens=gradient_tokens,
        batch_size=batch_size,
        passes=passes,
    )
    spectra, stages = factorized.spectra, factorized.stages
    with clock.stage("allocation"):
        trial = CalibrationTrial(model, sites, spectra, budget, tokens, batch_size)
        if target_kl is not None:
            budget = budget_for_kl(target_kl, allocation, spectra, budget, trial)
            rank_budgets = quantization.rank_budgets(budget)
        candidates = [allocation(spectra, rank_budget, trial) for rank_budget in rank_budgets]
        ranks = best_ranks(candidates, sites, spectra, budget, quantization)
        truncated = truncated_sites(ranks, sites, spectra, budget)
    # The factors are copies; from here on only the numbers of the spectra are needed, and the
    # vectors are freed unless the caller keeps them.
    spectra = {name: spectrum.head(0, torch.float32) for name, spectrum in spectra.items()}
    del factorized, trial
    with clock.stage("replacement"):
        replace_(model, {name: s.factors for name, s in truncated.items() if s.factors})
    with clock.stage("quantization"):
        asked = Needs(gradient_windows=quantization.gradient_windows)
        if asked != Needs():
            groups = in_groups(sites, passes)
            truncated = with_gradient(truncated, model, tokens, asked, groups, batch_size)
        stored = quantization(truncated, budget.limit, half_dtype(model.dtype))
        store_(model, stored)
    plan = make_plan(ranks, spectra, budget, kl=predicts_kl(whitening), stored=stored)
    mark_compressed_(model)
    sigma = {site: spectrum.sigma for site, spectrum in spectra.items()}
    return Compressed(model, plan, sigma, {**stages, **clock.stages})


def feasible_budget(
    sites: Mapping[str, nn.Linear],
    ratio: float | None,
    quantization: Quantization,
    min_rank_fraction: float,
) -> Budget:
    """Return the budget of a ratio (None: of 1), checked before any work is done for it.

    Raises:
        BudgetError: it cannot be met.
    """
    shapes = {name: Shape(*site.weight.shape) for name, site in sites.items()}
    whole = 1.0 if ratio is None else ratio
    budget = Budget(shapes, whole, quantization.cost, min_rank_fraction)
    quantization.rank_budgets(budget)
    return budget


def factorize(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    whitening: Whitening,
    allocation: Allocation,
    quantization: Quantization = NoQuantization(),  # noqa: B008 (frozen)
    factorization: Factorization = Factorization(),  # noqa: B008 (frozen)
    selection: SiteSelection = SiteSelection(),  # noqa: B008 (frozen)
    gradient_tokens: Tensor | None = None,
    batch_size: int = 8,
    passes: int = 1,
    statistics: Mapping[str, SiteStatistics] | None = None,
) -> Factorized:
    """Return the spectra of all sites, scored as the allocation needs; the model is not changed.

    They hold for every ratio, and for every allocation and quantisation that needs no other
    statistics and plans no higher ranks than this one. Arguments are those of `compress`;
    `statistics` is what `collect` returned for this model, instead of collecting.
    """
    clock = StageClock()
    sites = _sites(model, selection)
    needs = whitening.needs | allocation.needs
    groups = in_groups(sites, passes)
    largest = max(statistics_bytes(group, needs) for group in groups)
    log.info("%d sites; statistics take at most %.1f MiB", len(sites), largest / 2**20)
    if needs != Needs():
        warn_if_few(tokens, {name: site.in_features for name, site in sites.items()})
    spectra: dict[str, Spectrum] = {}
    for group in groups:
        with clock.stage("statistics"):
            if statistics is None:
                found = _collect(model, tokens, group, needs, gradient_tokens, batch_size)
            else:
                found = dict(statistics)
        with clock.stage("factorization"):
            for name in track(list(group), len(group), "factorization", "site"):
                # Absent only where the caller gave those of other sites; `need` then names it.
                of_site = found.pop(name, SiteStatistics(name)).to(factorization.precision.dtype)
                spectrum = _spectrum(group[name], of_site, whitening, allocation, factorization)
                cost = quantization.cost(Shape(*group[name].weight.shape))
                keep = torch.promote_types(group[name].weight.dtype, torch.float32)
                spectra[name] = spectrum.head(cost.break_even_rank, keep)
    return Factorized(spectra, clock.stages)


def _collect(
    model: PreTrainedModel,
    tokens: Tensor,
    sites: Mapping[str, nn.Linear],
    needs: Needs,
    gradient_tokens: Tensor | None,
    batch_size: int,
) -> dict[str, SiteStatistics]:
    """Collect everything, the gradient from windows of its own if there are any."""
    if gradient_tokens is None:
        return collect(model, tokens, sites, needs, batch_size)
    found = collect(model, tokens, sites, replace(needs, gradient_windows=0), batch_size)
    gradient = Needs(gradient_windows=needs.gradient_windows)
    other = collect(model, gradient_tokens, sites, gradient, batch_size)
    return {name: replace(s, gradient=other[name].gradient) for name, s in found.items()}


def _spectrum(
    site: nn.Linear,
    statistics: SiteStatistics,
    whitening: Whitening,
    allocation: Allocation,
    factorization: Factorization,
) -> Spectrum:
    """Factorise one site, and score it as the allocation needs it."""
    spectrum = factorization(site.weight, whitening(statistics), statistics.site)
    if allocation.needs.gradient_windows:
        spectrum = with_loss_change(spectrum, statistics.need("gradient"))
    if allocation.needs.fisher_rows:
        rows = statistics.need("fisher_rows")
        spectrum = with_fisher_norm(spectrum, site.weight, rows)
    return spectrum


def _sites(model: PreTrainedModel, selection: SiteSelection) -> dict[str, nn.Linear]:
    if compressed_layers(model):
        raise ModelError("this model is compressed already; start from the dense one")
    return find_sites(model, selection)
