"""The common base of allocations by the first-order change of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from iosvd.errors import ConfigError, check_at_least
from iosvd.statistics.needs import ALL_WINDOWS, Needs
from iosvd.types import Spectrum


@dataclass(frozen=True)
class FirstOrder:
    """An allocation that needs the gradient of the calibration loss."""

    gradient_windows: int = 0  # Calibration windows of the gradient; 0: all of them.

    def __post_init__(self) -> None:
        check_at_least(0, gradient_windows=self.gradient_windows)

    @property
    def needs(self) -> Needs:
        return Needs(gradient_windows=self.gradient_windows or ALL_WINDOWS)


def loss_changes(spectra: Mapping[str, Spectrum]) -> dict[str, Tensor]:
    """Return −g_i σ_i of every component, by site, in the order of σ.

    Raises:
        ConfigError: the spectra were not scored.
    """
    changes = {}
    for site, spectrum in spectra.items():
        if spectrum.loss_change is None:
            raise ConfigError(
                f"the spectrum of {site} has no loss_change; factorize with the allocation that"
                " needs it"
            )
        changes[site] = spectrum.loss_change
    return changes
