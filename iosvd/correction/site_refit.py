"""The closed form of one site's refit."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from torch import Tensor, nn

from iosvd.correction.base import CorrectionInputs
from iosvd.correction.drift import Drift, best_weight, squared_error
from iosvd.correction.refit_options import RefitOptions
from iosvd.factorization import truncate
from iosvd.linalg import IdentityRoot, Root, RootKind, root_of
from iosvd.types import Factors, Site, Spectrum, Whitener

log = logging.getLogger(__name__)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # Compared on the held-out windows.


def refitted(
    inputs: CorrectionInputs,
    options: RefitOptions,
    site: Site,
    dense: nn.Linear,
    fitted: Drift,
    held_out: Drift | None,
) -> Site:
    """Return one site refitted, in the dtype of the model.

    Args:
        inputs: of the correction.
        options: of the refit.
        site: truncated.
        dense: its layer in the dense model.
        fitted: drift of the site's input on most windows.
        held_out: the same on the held-out windows, if there are any.
    """
    if site.factors is None and not options.dense_sites:
        return site
    biased = dense.bias is not None or (options.bias and site.factors is not None)
    place = (dense.weight.device, inputs.factorization.precision.dtype)
    weight, fitted = dense.weight.to(*place), fitted.to(*place)
    held_out = None if held_out is None else held_out.to(*place)
    whole = fitted if held_out is None else fitted.mixed(held_out)
    if biased:
        fitted = fitted.centred()
        held_out = None if held_out is None else held_out.centred()
    solve = _Solve(inputs, options, site, weight)
    ridge = options.ridge if held_out is None else solve.best_ridge(fitted, held_out)
    best = solve.best(whole.centred() if biased else whole, ridge)
    bias = _bias(dense, weight - best.product, whole, best.trust) if biased else None
    return replace(_stored_in(dense.weight, site, best), bias=bias)


@dataclass(frozen=True)
class _Best:
    """The best weight of a site, and its factors if the rank is less than full."""

    product: Tensor  # (m, n)
    trust: float  # Of its target.
    factors: Factors | None = None
    spectrum: Spectrum | None = None  # That the factors were truncated from.


@dataclass(frozen=True)
class _Solve:
    """One site's closed form."""

    inputs: CorrectionInputs
    options: RefitOptions
    site: Site
    weight: Tensor  # W, (m, n), in the precision of the factorisation.

    def best_ridge(self, fitted: Drift, held_out: Drift) -> float:
        """Return the ridge whose fit has the least error on the held-out windows."""
        left = self._left()

        def error(ridge: float) -> float:
            change = self.best(fitted, ridge).product - self.weight
            return squared_error(change, self.weight, held_out, left)

        return min(RIDGES, key=error)

    def best(self, drift: Drift, ridge: float) -> _Best:
        """Return the best weight of the site's rank."""
        name, right = self.site.name, self._right(drift)
        ridge = max(ridge, right.damping)
        trust = self._trust(drift, ridge)
        best = best_weight(self.weight, drift, trust, ridge, name)
        if self.site.factors is None:
            return _Best(best, trust)
        spectrum = self.inputs.factorization(best, Whitener(self._left(), right), name)
        factors = truncate(spectrum, self.site.factors.rank)
        return _Best(factors.dense(), trust, factors, spectrum)

    def _trust(self, drift: Drift, ridge: float) -> float:
        adaptive, factors = self.options.adaptive, self.site.factors
        if adaptive is None or factors is None:
            return self.options.trust
        trust = adaptive.of(self.weight, drift, ridge, factors.rank)
        log.debug("%s: trust %.4g", self.site.name, trust)
        return trust

    def _right(self, drift: Drift) -> Root:
        what = f"the input metric of {self.site.name} behind the compressed layers"
        return root_of(drift.inputs, self.options.damping, RootKind.cholesky, what)

    def _left(self) -> Root:
        if not self.options.output_metric:
            return IdentityRoot()
        statistics = self.inputs.statistics[self.site.name]
        return self.inputs.whitening(statistics.to(self.weight.device, self.weight.dtype)).left


def _stored_in(like: Tensor, site: Site, best: _Best) -> Site:
    """Return the site with its best weight or factors, in the dtype of the model."""
    if best.factors is None or best.spectrum is None:
        return replace(site, weight=best.product.to(like.dtype))
    factors = replace(
        best.factors,
        left=best.factors.left.to(like.dtype).contiguous(),
        right=best.factors.right.to(like.dtype).contiguous(),
    )
    return replace(
        site,
        weight=site.weight.detach().to("meta"),  # Not kept beside its factors.
        factors=factors,
        output_diagonal=best.spectrum.output_diagonal,
        input_diagonal=best.spectrum.input_diagonal,
    )


def _bias(dense: nn.Linear, change: Tensor, drift: Drift, trust: float) -> Tensor:
    """Return the bias (m,) that goes with a weight W − change."""
    added = change @ drift.mean_input + trust * drift.mean_target(dense.weight.to(change))
    if dense.bias is not None:
        added = dense.bias.to(added) + added
    return added.to(dense.weight.dtype)
