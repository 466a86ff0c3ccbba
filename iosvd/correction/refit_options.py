"""Options of the refit: what each site is refitted to."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.correction.adaptive_trust import AdaptiveTrust
from iosvd.correction.work import CorrectionWork, PlannedModel
from iosvd.errors import ConfigError, check_at_least
from iosvd.grams import GRAM_SHARE
from iosvd.statistics.planning import Work


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

    def closed_form_work(self, planned: PlannedModel) -> CorrectionWork:
        """Return the work of refitting every site of every block."""
        shapes = planned.shapes
        # The dense block runs once, its twin once with all sites refitted.
        model, sums = shapes.body + planned.compressed, 0.0
        for groups in shapes.groups:
            before, written = 0, 0
            for group in groups:
                first, entries = group[0], sum(shape.entries for shape in group)
                model += planned.ratio * before  # The twin runs up to the group's input.
                sums += (GRAM_SHARE + 1) * first.n**2
                if self.stream and len(group) == 1 and first.m == shapes.activations.hidden:
                    model += written  # The dense stream, from the inputs of earlier writers.
                    sums += first.entries
                    written += entries
                before += entries
        return CorrectionWork(Work(model, sums), factorizations=1)
