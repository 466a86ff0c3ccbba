"""The statistics that can be requested, and those of one site."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from iosvd.errors import ConfigError
from iosvd.statistics.fisher import FisherMetric
from iosvd.statistics.kl_metric import KLMetric

ALL_WINDOWS = 10**9  # More than any calibration set has.


@dataclass(frozen=True)
class Needs:
    """Statistics that a whitening, an allocation or a quantisation requests."""

    input_metric: bool = False
    input_magnitude: bool = False
    kl_metric: KLMetric | None = None
    fisher_metric: FisherMetric | None = None
    fisher_rows: bool = False
    fisher_elements: bool = False
    kronecker_passes: int = 0  # Passes over the calibration set for the Kronecker factors; 0: none.
    gradient_windows: int = 0  # Calibration windows of the loss gradient; 0: none asked for.

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            input_metric=self.input_metric or other.input_metric,
            input_magnitude=self.input_magnitude or other.input_magnitude,
            kl_metric=self.kl_metric or other.kl_metric,
            fisher_metric=self.fisher_metric or other.fisher_metric,
            fisher_rows=self.fisher_rows or other.fisher_rows,
            fisher_elements=self.fisher_elements or other.fisher_elements,
            kronecker_passes=max(self.kronecker_passes, other.kronecker_passes),
            gradient_windows=max(self.gradient_windows, other.gradient_windows),
        )

    def parts(self) -> dict[str, Needs]:
        """Return the single requests, by the name of their field."""
        asked = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: Needs(**{name: value}) for name, value in asked.items() if value}

    @property
    def of_inputs(self) -> bool:
        """Whether a statistic of the sites' inputs is asked for."""
        return self.input_metric or self.input_magnitude

    @property
    def backward(self) -> bool:
        """Whether a backward pass is needed."""
        return self.kl_metric is not None or self.fisher_metric is not None or self.true_loss

    @property
    def true_loss(self) -> bool:
        """Whether the loss of the true next tokens is back-propagated."""
        return self.gradient_windows > 0 or self.every_loss

    @property
    def every_loss(self) -> bool:
        """Whether it is needed for every window, not only for the gradient's."""
        empirical = self.fisher_metric is not None and not self.fisher_metric.sampled
        return empirical or self.every_gradient

    @property
    def every_gradient(self) -> bool:
        """Whether the weight's gradient is needed for each window separately."""
        return self.fisher_rows or self.fisher_elements or self.kronecker_passes > 0


@dataclass(frozen=True)
class SiteStatistics:
    """Calibration statistics of one site; None if not requested."""

    site: str
    input_metric: Tensor | None = None  # R = E[x xᵀ], (n, n)
    input_magnitude: Tensor | None = None  # E|x|, (n,)
    kl_metric: Tensor | None = None  # C, (m, m), nats per token and squared unit of output
    fisher_metric: Tensor | None = None  # E[g gᵀ] of the loss's gradient in the output, (m, m)
    fisher_rows: Tensor | None = None  # Σ_j E[(∂ℓ/∂W_ij)²] over windows, (m,)
    fisher_elements: Tensor | None = None  # E[(∂ℓ/∂W_ij)²] over windows, (m, n)
    kronecker_left: Tensor | None = None  # B of the Fisher ≈ B ⊗ A of windows, (m, m)
    kronecker_right: Tensor | None = None  # A of the same, (n, n)
    gradient: Tensor | None = None  # of the mean next-token loss with respect to W, (m, n)

    def need(self, name: str) -> Tensor:
        """Return a statistic that must have been collected.

        Raises:
            ConfigError: it was not collected.
        """
        value = getattr(self, name)
        if value is None:
            raise ConfigError(
                f"the statistics of {self.site} have no {name};"
                " collect them with needs=whitening.needs | allocation.needs"
            )
        return value

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> SiteStatistics:
        """Move the statistics to a device, and cast them if a dtype is given."""
        found = {name: getattr(self, name) for name in STATISTICS}
        cast = {
            n: one.to(device, dtype or one.dtype) for n, one in found.items() if one is not None
        }
        return replace(self, **cast)


STATISTICS = tuple(field.name for field in fields(SiteStatistics) if field.name != "site")


# The statistics behind a field of `Needs`, if they are not named like the field.
_FOUND = {
    "kronecker_passes": ("kronecker_left", "kronecker_right"),
    "gradient_windows": ("gradient",),
}


# These depend only on the site's input; sites that read the same tensor share them.
OF_INPUT = frozenset({"input_metric", "input_magnitude"})


def statistics_for(need: str) -> tuple[str, ...]:
    """Return the statistics that a field of `Needs` requests."""
    return _FOUND.get(need, (need,))
