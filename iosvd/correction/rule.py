"""What a site is refitted to, and its refit in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from iosvd.correction.base import Given
from iosvd.correction.drift import Drift, best_weight, squared_error
from iosvd.errors import ConfigError, check_at_least
from iosvd.factorization import truncate
from iosvd.layers.modules import LowRankLinear
from iosvd.linalg import IdentityRoot, Root, RootKind, root_of
from iosvd.types import Factors, Site, Whitener

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # That are compared on held-out windows.


@dataclass(frozen=True)
class Rule:
    """What a site is refitted to."""

    trust: float  # 0: to its own output behind the prefix; 1: to the dense model's.
    ridge: float  # Towards W, relative to the mean diagonal of R_c.
    held_out: float  # Share of the windows on which the ridge is chosen; 0: it is as given.
    stream: bool  # Sites that write to the residual stream make good what it lacks.
    output_metric: bool  # Truncate in the whitening's output metric, not in the plain one.
    bias: bool  # Factorised sites get a bias where they have none.
    dense_sites: bool  # Refit sites that stay dense, too.
    damping: float  # Of R_c, relative.

    def __post_init__(self) -> None:
        check_at_least(0, trust=self.trust, ridge=self.ridge, damping=self.damping)
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out:g} is outside [0, 1)")


def refitted(
    given: Given, rule: Rule, site: Site, dense: nn.Linear, fitted: Drift, held: Drift | None
) -> Site:
    """Refit one site in place, and return it as it is now.

    Args:
        given: what the correction was given.
        rule: what it is refitted to.
        site: truncated.
        dense: its layer in the dense model.
        fitted, held: the drift of its input, on most windows and on those that were held out.
    """
    layer = given.model.get_submodule(site.name)
    assert isinstance(layer, nn.Linear | LowRankLinear)
    if site.factors is None and not rule.dense_sites:
        return site
    biased = dense.bias is not None or (rule.bias and site.factors is not None)
    place = (dense.weight.device, given.factorization.precision.dtype)
    weight, fitted = dense.weight.to(*place), fitted.to(*place)
    held = None if held is None else held.to(*place)
    whole = fitted if held is None else fitted.mixed(held)
    if biased:
        fitted, held = fitted.centred(), None if held is None else held.centred()
    solve = _Solve(given, rule, site, weight)
    ridge = rule.ridge if held is None else solve.best_ridge(fitted, held)
    product, now = solve.put(layer, whole.centred() if biased else whole, ridge)
    if biased:
        _put_bias(layer, dense, _bias(weight, product, whole, rule.trust))
    return now


@dataclass(frozen=True)
class _Solve:
    """One site's closed form."""

    given: Given
    rule: Rule
    site: Site
    weight: Tensor  # W, (m, n), in the precision of the factorisation.

    def best_ridge(self, fitted: Drift, held: Drift) -> float:
        """Return the ridge whose fit does best on windows that it has not seen."""
        left = self._left()

        def error(ridge: float) -> float:
            change = self._factors(fitted, ridge)[0] - self.weight
            return squared_error(change, self.weight, held, left)

        return min(RIDGES, key=error)

    def put(
        self, layer: nn.Linear | LowRankLinear, drift: Drift, ridge: float
    ) -> tuple[Tensor, Site]:
        """Give the layer its weight or factors; return their product, and the site."""
        product, factors, found = self._factors(drift, ridge)
        if factors is None:
            layer.weight.copy_(product)
            return product, replace(self.site, weight=layer.weight)
        assert isinstance(layer, LowRankLinear) and found is not None
        layer.left.copy_(factors.left)
        layer.weight.copy_(factors.right)
        # As they are in the model: rows are rounded from there.
        kept = replace(factors, left=layer.left.data, right=layer.weight.data)
        return product, replace(
            self.site, factors=kept, output_diagonal=found[0], input_diagonal=found[1]
        )

    def _factors(
        self, drift: Drift, ridge: float
    ) -> tuple[Tensor, Factors | None, tuple[Tensor, Tensor] | None]:
        """Return the best weight, or its factors too where the rank is less than full."""
        name = self.site.name
        right = self._right(drift)
        best = best_weight(self.weight, drift, self.rule.trust, max(ridge, right.damping), name)
        if self.site.factors is None:
            return best, None, None
        spectrum = self.given.factorization(best, Whitener(self._left(), right), name)
        factors = truncate(spectrum, self.site.factors.rank)
        return factors.dense(), factors, (spectrum.output_diagonal, spectrum.input_diagonal)

    def _right(self, drift: Drift) -> Root:
        what = f"the input metric of {self.site.name} behind the compressed layers"
        return root_of(drift.inputs, self.rule.damping, RootKind.cholesky, what)

    def _left(self) -> Root:
        if not self.rule.output_metric:
            return IdentityRoot()
        statistics = self.given.statistics[self.site.name]
        return self.given.whitening(statistics.to(self.weight.device, self.weight.dtype)).left


def _bias(weight: Tensor, product: Tensor, drift: Drift, trust: float) -> Tensor:
    """Return what is to be added to the dense layer's bias, (m,)."""
    return (weight - product) @ drift.mean_input + trust * drift.mean_target(weight)


def _put_bias(layer: nn.Linear | LowRankLinear, dense: nn.Linear, added: Tensor) -> None:
    if layer.bias is None:
        assert isinstance(layer, LowRankLinear)
        layer.bias = nn.Parameter(
            added.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad
        )
        layer.added_bias = True
    else:
        layer.bias.copy_(added if dense.bias is None else dense.bias.to(added) + added)
