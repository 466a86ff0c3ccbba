"""A compression method, and the goal that it is to reach."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.allocation import Allocation
from iosvd.budget import Budget, Shape
from iosvd.cache.calibration import Calibration
from iosvd.correction import Correction, NoCorrection
from iosvd.errors import ConfigError, check_at_least, check_installed
from iosvd.factorization import Factorization
from iosvd.models.linear_form import RoutedLinear
from iosvd.models.sites import cached_widths
from iosvd.quantization import NoQuantization, Quantization
from iosvd.target import check_target
from iosvd.whitening import Whitening


@dataclass(frozen=True)
class Method:
    """One variant of each step: the row of a table."""

    whitening: Whitening
    allocation: Allocation
    correction: Correction = NoCorrection()  # noqa: RUF009 (frozen)
    quantization: Quantization = NoQuantization()  # noqa: RUF009 (frozen)
    factorization: Factorization = Factorization()  # noqa: RUF009 (frozen)
    min_rank_fraction: float = 0.0  # Of its break-even rank, which every site keeps at least.

    def check_visits(self) -> None:
        """Raise ConfigError if the method cannot compress blocks that live in main memory."""
        if not self.correction.works_on_visits:
            raise ConfigError(
                "this correction needs all decoder blocks on the device; set"
                " runtime.blocks_on_cpu=false or correction=none"
            )


@dataclass(frozen=True)
class Goal:
    """A maintenance ratio, or a predicted quality."""

    ratio: float | None = None  # Bits kept / 16 bits for every parameter of the sites, in (0, 1].
    target_kl: float | None = None  # Nats per token: the smallest ratio predicted to stay within.
    # Of a generation (batch × context) whose cache counts in the ratio, beside the weights.
    cache_tokens: int = 0

    def check(self, method: Method) -> None:
        """Check that exactly one is set, and that the method can reach it here.

        Raises:
            ConfigError: both or none are set, or the method predicts no KL divergence.
            MissingExtraError: a library that the method needs is not installed.
        """
        if (self.ratio is None) == (self.target_kl is None):
            raise ConfigError("give either a ratio or a target_kl")
        check_installed([*method.allocation.libraries, *method.correction.libraries])
        self.check_cache(method)
        if self.target_kl is not None:
            check_target(self.target_kl, method.whitening, method.quantization)

    def check_cache(self, method: Method) -> None:
        """Raise ConfigError if a cache cannot count beside the weights."""
        check_at_least(0, cache_tokens=self.cache_tokens)
        if self.cache_tokens and method.quantization.rounds:
            raise ConfigError(
                "cache_tokens needs quantization=none: bits of a cache and of rounded rows are not"
                " planned together"
            )

    def shapes(self, calibration: Calibration, method: Method) -> dict[str, Shape]:
        """Return the shapes of the sites, with what the method and the goal add to them.

        Raises:
            ConfigError: tokens are cached, but no site makes keys or values.
        """
        sites = calibration.sites
        widths = cached_widths(calibration.model, sites)
        if self.cache_tokens and not any(widths.values()):
            raise ConfigError(
                f"cache_tokens={self.cache_tokens}, but no site is called k_proj or v_proj; set it"
                " to 0"
            )
        return {
            name: Shape(
                site.out_features,
                site.in_features,
                # No correction refits experts.
                adds_bias=method.correction.adds_bias
                and site.bias is None
                and not isinstance(site, RoutedLinear),
                cached_width=widths[name],
                cached_tokens=self.cache_tokens if widths[name] else 0,
            )
            for name, site in sites.items()
        }

    def budget(self, calibration: Calibration, method: Method) -> Budget:
        """Return the budget of the ratio (of ratio 1 for a target_kl) over the sites.

        Raises:
            BudgetError: it cannot be met.
        """
        shapes = self.shapes(calibration, method)
        ratio = 1.0 if self.ratio is None else self.ratio
        budget = Budget(shapes, ratio, method.quantization.cost, method.min_rank_fraction)
        method.quantization.rank_budgets(budget)  # Raises if the ranks cannot be planned.
        return budget
