"""compress(): the algorithm, from calibration windows to a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from iosvd.budget import Budget, site_cost
from iosvd.cache.calibration import Calibration, check_dense
from iosvd.cache.keys import SpectrumKeys
from iosvd.cache.losses import CachedLosses
from iosvd.cache.spectra import Factorized, SpectraOf, without_components
from iosvd.cache.statistics import CachedStatistics
from iosvd.cache.store import NoStore, Store
from iosvd.correction import CorrectionInputs, CorrectionResult
from iosvd.data.windows import warn_if_few
from iosvd.layers.replacement import (
    check_finite,
    install_,
    install_quantized_,
    set_parameters_,
)
from iosvd.layers.rows import half_dtype
from iosvd.method import Goal, Method
from iosvd.models.sites import SiteSelection
from iosvd.models.visiting import visits
from iosvd.plan import Plan, make_plan
from iosvd.statistics.memory import MemoryUse
from iosvd.statistics.needs import Needs
from iosvd.system.timing import Stage, StageClock
from iosvd.target import budget_for_kl
from iosvd.trials import TruncationTrials
from iosvd.truncation import TruncatedSites, best_ranks, with_gradient
from iosvd.types import Spectrum, Stored
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Compressed:
    """The compressed model (the given one, changed in place), its plan, and what it cost."""

    model: PreTrainedModel
    plan: Plan
    sigma: Mapping[str, Tensor]  # (min(m, n),) per site: all singular values, also dropped ones.
    stages: Mapping[str, Stage]


def compress(
    model: PreTrainedModel,
    tokens: Tensor | Windows,
    *,
    method: Method | str,
    ratio: float | None = None,
    target_kl: float | None = None,
    cache_tokens: int = 0,
    factorized: Factorized | None = None,
    selection: SiteSelection = SiteSelection(),  # noqa: B008 (frozen)
    gradient_tokens: Tensor | Windows | None = None,
    batch_size: int = 8,
    memory: MemoryUse = MemoryUse(),  # noqa: B008 (frozen)
    store: Store = NoStore(),  # noqa: B008 (frozen)
    identity: str = "",
) -> Compressed:
    """Compress a causal language model to a maintenance ratio, or to a predicted quality.

    Args:
        model: changed in place.
        tokens: calibration windows (windows, length), or those of images and text.
        method: its parts, or the name of a preset ("io_svd_plus"); see `preset_names`.
        ratio: bits kept / 16 bits for every parameter of the target sites, in (0, 1]; without
            quantisation that is the share of the parameters.
        target_kl: instead of a ratio: find the smallest ratio whose predicted KL divergence, nats
            per token, stays within it.
        cache_tokens: of a generation (batch × context) whose cache counts in the ratio beside the
            weights, so that keys and values get the ranks that it wants.
        factorized: the result of `factorize` for this model, to compress it to several ratios.
        selection, gradient_tokens, batch_size, memory, store, identity: see `Calibration.of`.

    Raises:
        IosvdError: one line that names the cause and the remedy.
    """
    chosen = _method(method, ratio, target_kl)
    calibration = Calibration.of(
        model,
        tokens,
        selection=selection,
        gradient_tokens=gradient_tokens,
        batch_size=batch_size,
        memory=memory,
        store=store,
        identity=identity,
    )
    return compress_to(Goal(ratio, target_kl, cache_tokens), chosen, calibration, factorized)


def factorize(
    model: PreTrainedModel,
    tokens: Tensor | Windows,
    *,
    method: Method | str,
    ratio: float | None = None,
    cache_tokens: int = 0,
    selection: SiteSelection = SiteSelection(),  # noqa: B008 (frozen)
    gradient_tokens: Tensor | Windows | None = None,
    batch_size: int = 8,
    memory: MemoryUse = MemoryUse(),  # noqa: B008 (frozen)
    store: Store = NoStore(),  # noqa: B008 (frozen)
    identity: str = "",
) -> Factorized:
    """Return the spectra of all sites, scored as the allocation asks; the model is not changed.

    They serve every ratio, and every allocation and quantisation that needs no other statistics
    and, without a store, plans no higher ranks. Exception: if all sites stay dense at the given
    ratio and the method reads no statistics, nothing is computed and the spectra are empty.
    Arguments are those of `compress`.
    """
    # Spectra do not depend on the options that follow the ratio.
    chosen = _method(method, 1.0 if ratio is None else ratio, None)
    calibration = Calibration.of(
        model,
        tokens,
        selection=selection,
        gradient_tokens=gradient_tokens,
        batch_size=batch_size,
        memory=memory,
        store=store,
        identity=identity,
    )
    return spectra_for(Goal(ratio, None, cache_tokens), chosen, calibration)


def compress_to(
    goal: Goal, method: Method, calibration: Calibration, factorized: Factorized | None = None
) -> Compressed:
    """Compress a calibrated model, which is changed in place. This is the algorithm.

    Raises:
        IosvdError: one line that names the cause and the remedy.
    """
    from iosvd.layers.checkpoint import mark_compressed_  # Imports much of transformers.

    goal.check(method)
    check_dense(calibration.model)
    method.correction.check(calibration)
    if visits(calibration.model):
        method.check_visits()
    model, clock = calibration.model, StageClock()
    budget = goal.budget(calibration, method)
    factorized = factorized or spectra_for(goal, method, calibration)
    spectra = factorized.spectra
    with clock.stage("allocation"):
        losses = CachedLosses(calibration.store, _spectrum_keys(method, calibration))
        budget, ranks = _allocated(goal, method, calibration, spectra, budget, losses)
    for cost in losses.elsewhere:
        clock.add("allocation", cost)
    with clock.stage("correction"):
        truncated = TruncatedSites(ranks, calibration.sites, spectra, budget)
        corrected = _corrected(method, calibration, truncated)
        install_(model, corrected.sites)
        set_parameters_(model, corrected.parameters)
    for cost in corrected.costs:
        clock.add("correction", cost)
    with clock.stage("quantization"):
        stored = _quantized(method, calibration, corrected, budget)
        install_quantized_(model, stored)
    check_finite(model)
    mark_compressed_(model)
    plan = make_plan(corrected.ranks, spectra, budget, method.whitening.predicts_kl, stored)
    sigma = {site: spectrum.sigma.clone() for site, spectrum in spectra.items()}
    return Compressed(model, plan, sigma, {**factorized.stages, **clock.stages})


def spectra_for(goal: Goal, method: Method, calibration: Calibration) -> Factorized:
    """Return the spectra of all sites; none are computed if all sites stay dense."""
    read = method.whitening.needs | method.allocation.needs
    if read != Needs():
        widths = {name: site.in_features for name, site in calibration.sites.items()}
        warn_if_few(calibration.windows, widths)
    elif goal.ratio is not None:
        budget = goal.budget(calibration, method)
        if all(under.fits_dense for under in method.quantization.rank_budgets(budget)):
            return without_components(calibration.sites)
    shapes = goal.shapes(calibration, method)
    spectra_of = SpectraOf(
        whitening=method.whitening,
        scored=method.allocation.needs,
        costs={site: site_cost(shape, method.quantization.cost) for site, shape in shapes.items()},
        factorization=method.factorization,
    )
    return spectra_of(calibration)


def _method(method: Method | str, ratio: float | None, target_kl: float | None) -> Method:
    if isinstance(method, Method):
        return method
    from iosvd.presets import preset  # Only presets need OmegaConf.

    return preset(method, ratio, target_kl)


def _allocated(
    goal: Goal,
    method: Method,
    calibration: Calibration,
    spectra: Mapping[str, Spectrum],
    budget: Budget,
    losses: CachedLosses,
) -> tuple[Budget, Mapping[str, int]]:
    """Return the budget, which a target_kl lowers, and the ranks under it."""
    objective = TruncationTrials(calibration, spectra, budget, losses)
    if goal.target_kl is not None:
        budget = budget_for_kl(goal.target_kl, method.allocation, spectra, budget, objective)
    candidates = [
        under.full_ranks if under.fits_dense else method.allocation(spectra, under, objective)
        for under in method.quantization.rank_budgets(budget)
    ]
    ranks = best_ranks(candidates, calibration.sites, spectra, budget, method.quantization)
    return budget, ranks


def _corrected(
    method: Method, calibration: Calibration, truncated: TruncatedSites
) -> CorrectionResult:
    statistics = {}
    if method.correction.needs_metrics:
        statistics = CachedStatistics(calibration).in_passes(method.whitening.needs)
    inputs = CorrectionInputs(
        calibration=calibration,
        sites=truncated,
        statistics=statistics,
        whitening=method.whitening,
        allocation=method.allocation,
        factorization=method.factorization,
    )
    return method.correction(inputs)


def _quantized(
    method: Method, calibration: Calibration, corrected: CorrectionResult, budget: Budget
) -> Mapping[str, Stored]:
    """Return the sites that are stored in other than the model's dtype."""
    quantization, sites = method.quantization, corrected.sites
    if quantization.gradient_windows:
        sites = with_gradient(sites, calibration, quantization.gradient_windows)
    limit = budget.limit - budget.bias_bits(corrected.ranks)
    return quantization(sites, limit, half_dtype(calibration.model.dtype))


def _spectrum_keys(method: Method, calibration: Calibration) -> SpectrumKeys:
    return SpectrumKeys(calibration.keys, method.whitening, method.factorization)
