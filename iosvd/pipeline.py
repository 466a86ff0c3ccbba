"""compress(): the algorithm, from calibration windows to a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from iosvd.allocation import Allocation
from iosvd.budget import Budget, Shape
from iosvd.cache.keys import Keys
from iosvd.cache.losses import KeptLosses
from iosvd.cache.spectra import Factorized, SpectraOf, without_components
from iosvd.cache.statistics import Gatherer
from iosvd.cache.store import NoStore, Store
from iosvd.correction import Correction, Given, NoCorrection
from iosvd.data.windows import warn_if_few
from iosvd.errors import ConfigError, ModelError
from iosvd.factorization import Factorization
from iosvd.layers.replacement import check_finite, compressed_layers, store_
from iosvd.layers.rows import half_dtype
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.plan import Plan, make_plan
from iosvd.quantization import NoQuantization, Quantization
from iosvd.statistics.memory import MemoryUse
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.system.timing import Stage, StageClock
from iosvd.target import budget_for_kl, check_target
from iosvd.trials import CalibrationTrial
from iosvd.truncation import TruncatedSites, best_ranks, with_gradient
from iosvd.whitening import Whitening

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel


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
    correction: Correction = NoCorrection(),  # noqa: B008 (frozen)
    quantization: Quantization = NoQuantization(),  # noqa: B008 (frozen)
    factorization: Factorization = Factorization(),  # noqa: B008 (frozen)
    selection: SiteSelection = SiteSelection(),  # noqa: B008 (frozen)
    min_rank_fraction: float = 0.0,
    gradient_tokens: Tensor | None = None,
    batch_size: int = 8,
    memory: MemoryUse = MemoryUse(),  # noqa: B008 (frozen)
    store: Store = NoStore(),  # noqa: B008 (frozen)
    identity: str = "",
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
        whitening, allocation, correction, quantization: the method.
        factorization: precision and algorithm of the decompositions.
        selection: which layers are targets.
        min_rank_fraction: of its break-even rank that every site keeps at least.
        gradient_tokens: windows of the loss gradient, which scores; None: the same.
        batch_size: windows per forward pass.
        memory: what statistics may take; with less, the calibration set is passed more often, each
            time for a part of the sites.
        store: where statistics, spectra and trials are kept, to be computed once; see `Cache`.
        identity: what tells the model's weights from those of all others that use the same store.
        factorized: what `factorize` returned for this model, to compress it to several ratios.

    Raises:
        IosvdError: one line that names the cause and the remedy.
    """
    from iosvd.layers.checkpoint import mark_compressed_  # Imports much of transformers.

    if (ratio is None) == (target_kl is None):
        raise ConfigError("give either a ratio or a target_kl")
    if target_kl is not None:
        check_target(target_kl, whitening, quantization)
    clock = StageClock()
    gather = _gatherer(
        model=model,
        tokens=tokens,
        gradient_tokens=gradient_tokens,
        whitening=whitening,
        factorization=factorization,
        selection=selection,
        batch_size=batch_size,
        memory=memory,
        store=store,
        identity=identity,
    )
    sites = gather.sites
    budget = feasible_budget(sites, ratio, quantization, min_rank_fraction, correction)
    rank_budgets = quantization.rank_budgets(budget)
    spectra_of = SpectraOf(whitening, allocation.needs, quantization.cost, factorization)
    factorized = factorized or _factorized(gather, spectra_of, ratio, quantization)
    spectra, stages = factorized.spectra, factorized.stages
    with clock.stage("allocation"):
        kept = KeptLosses(store, gather.keys, whitening.needs)
        trial = CalibrationTrial(model, sites, spectra, budget, tokens, batch_size, kept)
        if target_kl is not None:
            budget = budget_for_kl(target_kl, allocation, spectra, budget, trial)
            rank_budgets = quantization.rank_budgets(budget)
        candidates = [
            under.full_ranks if under.fits_dense else allocation(spectra, under, trial)
            for under in rank_budgets
        ]
        ranks = best_ranks(candidates, sites, spectra, budget, quantization)
    for cost in kept.elsewhere:
        clock.add("allocation", cost)
    with clock.stage("correction"):
        statistics: Mapping[str, SiteStatistics] = {}
        if correction.needs_metrics:
            statistics = gather.in_passes(whitening.needs)  # Before the model is changed.
        corrected = correction(
            Given(
                model=model,
                sites=TruncatedSites(ranks, sites, spectra, budget),
                statistics=statistics,
                tokens=tokens,
                whitening=whitening,
                allocation=allocation,
                factorization=factorization,
                batch_size=batch_size,
                memory=memory,
            )
        )
        truncated, ranks = corrected.sites, corrected.ranks
        del statistics
    with clock.stage("quantization"):
        if quantization.gradient_windows:
            asked = Needs(gradient_windows=quantization.gradient_windows)
            truncated = with_gradient(truncated, model, tokens, asked, batch_size, memory)
        stored = quantization(
            truncated, budget.limit - budget.bias_bits(ranks), half_dtype(model.dtype)
        )
        store_(model, stored)
    check_finite(model)
    plan = make_plan(ranks, spectra, budget, whitening.predicts_kl, stored)
    mark_compressed_(model)
    sigma = {site: spectrum.sigma.clone() for site, spectrum in spectra.items()}
    return Compressed(model, plan, sigma, {**stages, **clock.stages})


def feasible_budget(
    sites: Mapping[str, nn.Linear],
    ratio: float | None,
    quantization: Quantization,
    min_rank_fraction: float,
    correction: Correction = NoCorrection(),  # noqa: B008 (frozen)
) -> Budget:
    """Return the budget of a ratio (None: of 1), checked before any work is done for it.

    Raises:
        BudgetError: it cannot be met.
    """
    shapes = {
        name: Shape(
            site.out_features,
            site.in_features,
            adds_bias=correction.adds_bias and site.bias is None,
        )
        for name, site in sites.items()
    }
    whole = 1.0 if ratio is None else ratio
    budget = Budget(shapes, whole, quantization.cost, min_rank_fraction)
    quantization.rank_budgets(budget)
    return budget


def factorize(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    ratio: float | None = None,
    whitening: Whitening,
    allocation: Allocation,
    quantization: Quantization = NoQuantization(),  # noqa: B008 (frozen)
    factorization: Factorization = Factorization(),  # noqa: B008 (frozen)
    selection: SiteSelection = SiteSelection(),  # noqa: B008 (frozen)
    gradient_tokens: Tensor | None = None,
    batch_size: int = 8,
    memory: MemoryUse = MemoryUse(),  # noqa: B008 (frozen)
    store: Store = NoStore(),  # noqa: B008 (frozen)
    identity: str = "",
) -> Factorized:
    """Return the spectra of all sites, scored as the allocation needs; the model is not changed.

    They hold for every ratio, and for every allocation and quantisation that needs no other
    statistics and, without a store, plans no higher ranks than this one. But where a ratio is
    given at which every site stays dense, and the method reads no statistics, nothing is computed
    and the spectra have no components. Arguments are those of `compress`.
    """
    gather = _gatherer(
        model=model,
        tokens=tokens,
        gradient_tokens=gradient_tokens,
        whitening=whitening,
        factorization=factorization,
        selection=selection,
        batch_size=batch_size,
        memory=memory,
        store=store,
        identity=identity,
    )
    spectra_of = SpectraOf(whitening, allocation.needs, quantization.cost, factorization)
    return _factorized(gather, spectra_of, ratio, quantization)


def _gatherer(
    *,
    model: PreTrainedModel,
    tokens: Tensor,
    gradient_tokens: Tensor | None,
    whitening: Whitening,
    factorization: Factorization,
    selection: SiteSelection,
    batch_size: int,
    memory: MemoryUse,
    store: Store,
    identity: str,
) -> Gatherer:
    """Return the collector of a dense model's statistics; arguments are those of `compress`."""
    if store.keeps and not identity:
        raise ConfigError(
            "a store needs identity=…, which tells this model's weights from those of others in it"
        )
    if compressed_layers(model):
        raise ModelError("this model is compressed already; start from the dense one")
    return Gatherer(
        model=model,
        tokens=tokens,
        gradient_tokens=gradient_tokens,
        sites=find_sites(model, selection),
        batch_size=batch_size,
        memory=memory,
        store=store,
        keys=Keys.of(identity, tokens, gradient_tokens, whitening, factorization),
    )


def _factorized(
    gather: Gatherer, spectra_of: SpectraOf, ratio: float | None, quantization: Quantization
) -> Factorized:
    """Return the spectra of all sites; none are computed where a ratio leaves all sites dense."""
    if spectra_of.whitening.needs | spectra_of.scored != Needs():
        widths = {name: site.in_features for name, site in gather.sites.items()}
        warn_if_few(gather.tokens, widths)
    elif ratio is not None:
        budget = feasible_budget(gather.sites, ratio, quantization, 0.0)
        if all(under.fits_dense for under in quantization.rank_budgets(budget)):
            return without_components(gather.sites)
    return spectra_of(gather)
