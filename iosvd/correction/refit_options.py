"""Options of the refit: what each site is refitted to."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.correction.adaptive_trust import AdaptiveTrust
from iosvd.errors import ConfigError, check_at_least


@dataclass(frozen=True)
class RefitOptions:
    """The target of every site, and the regularisation of its closed form."""

    trust: float = 0.75  # Target: 1: the dense model's output t; 0: the site's own output W x_c.
    adaptive: AdaptiveTrust | None = None  # Chooses the trust of each factorised site instead.
    ridge: float = 1e-3  # Pulls towards W, relative to the mean diagonal of R_c.
    held_out: float = 0.0  # Share of the windows on which each site's ridge is chosen; 0: as given.
    stream: bool = True  # Sites that write to the residual stream make up for what it lacks.
    output_metric: bool = True  # Truncate in the whitening's output metric; False: plain metric.
    bias: bool = False  # Factorised sites without a bias get one, which costs m parameters.
    dense_sites: bool = True  # Refit sites that stay dense, too; it costs no parameters.
    damping: float = 1e-6  # Of R_c, relative (METHODS 2.6).

    def __post_init__(self) -> None:
        check_at_least(0, trust=self.trust, ridge=self.ridge, damping=self.damping)
        if self.adaptive is not None and self.stream:
            raise ConfigError(
                "correction.adaptive compares a site's own outputs; set correction.stream=false"
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out:g} is outside [0, 1)")
