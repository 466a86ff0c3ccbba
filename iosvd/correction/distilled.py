"""The anchored refit, then adapters trained to predict what the dense model predicts (ours)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.cache.calibration import Calibration
from iosvd.correction.adapters import FACTORS, Loss, Training, as_two_layers, sites_of
from iosvd.correction.anchored import Anchored
from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.seeding import seeded
from iosvd.correction.work import CorrectionWork, PlannedModel
from iosvd.errors import ConfigError, NumericalError
from iosvd.evaluation.divergence import divergence
from iosvd.layers.replacement import install_, twin_of
from iosvd.models.predictions import log_probabilities, summed_kl
from iosvd.statistics.planning import Work
from iosvd.types import Site
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distilled(Training, Correction):
    """Reduce, by gradient descent on all sites jointly, the error that the anchored refit leaves.

    Adapters of both factors, and of the sites that stay dense, lower the exact KL divergence of
    the compressed model from the dense one on the calibration windows, over the whole vocabulary:
    the function that the whitening expands to second order. The merged adapters add nothing to the
    ranks. Some windows are held out; if the divergence there does not fall, the adapters are
    dropped and the refit stays as it was.

    Cost: the factors beside the dense model, a second set of activations, and per epoch a forward
    pass of the dense model and a training step's work of the compressed one. Experiments and
    figures are in results/LOG.md.
    """

    anchored: Anchored = field(default_factory=Anchored)
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-3
    epochs: int = 3
    batch_windows: int = 2
    held_out: float = 0.1  # Share of the windows that are not trained on; at least one.
    seed: int = 0  # Of the adapters, of the held-out windows, and of the order of the others.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out:g} is outside (0, 1)")

    @property
    def needs_metrics(self) -> bool:
        return self.anchored.needs_metrics

    @property
    def adds_bias(self) -> bool:
        return self.anchored.adds_bias

    def work(self, planned: PlannedModel) -> CorrectionWork:
        shapes, compressed = planned.shapes, planned.compressed + planned.shapes.head
        # Backward to the activations alone; the adapters' own products are small.
        step = shapes.forward + 2 * compressed
        judged = 2 * self.held_out * (shapes.forward + compressed)
        model = self.epochs * (1 - self.held_out) * step + judged
        return self.anchored.work(planned) + CorrectionWork(Work(model, 0))

    def check(self, calibration: Calibration) -> None:
        if len(calibration.windows) < 2:
            raise ConfigError("distillation holds out a window: calibration.windows must be 2")

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        calibration = inputs.calibration
        refitted = self.anchored(inputs)
        dense, sites = calibration.model, _without_weights_of(calibration.sites, refitted.sites)
        compressed = twin_of(dense)
        install_(compressed, sites)
        with seeded(self.seed, dense.device), as_two_layers(compressed) as pairs:
            held_out, fitted = self._divided(calibration.windows)
            kl = partial(_divergence, dense, compressed, held_out, calibration.batch_size)
            before = kl()
            if before == 0:  # The dense model itself: there is nothing to lower.
                return refitted

            def accept() -> bool:
                try:
                    after = kl()
                except NumericalError:
                    return False
                log.info("KL on held-out windows: %.4g, distilled %.4g", before, after)
                return after < before

            factors = [f"{name}.{factor}" for name in pairs for factor in FACTORS]
            stays_dense = [name for name in sites if name not in pairs]
            self.train_and_merge(
                compressed,
                [*factors, *stays_dense],
                calibration,
                fitted,
                Loss(partial(kl_from, dense), lambda chosen: chosen.positions),
                accept,
            )
        return replace(refitted, sites=sites_of(compressed, sites))

    def _divided(self, windows: Windows) -> tuple[Windows, Windows]:
        """Return the held-out windows and the training windows; at least one of each."""
        order = torch.randperm(len(windows))
        count = min(max(1, round(self.held_out * len(windows))), len(windows) - 1)
        return windows[order[:count]], windows[order[count:]]


def _without_weights_of(
    dense: Mapping[str, nn.Linear], sites: Mapping[str, Site]
) -> dict[str, Site]:
    """Copy weights that sites share with the dense model, which training must not change."""
    return {
        name: replace(site, weight=site.weight.detach().clone())
        if site.weight is dense[name].weight and site.factors is None
        else site
        for name, site in sites.items()
    }


def _divergence(
    dense: PreTrainedModel, compressed: PreTrainedModel, windows: Windows, batch_size: int
) -> float:
    return divergence(dense, compressed, windows, batch_size).kl


def kl_from(dense: PreTrainedModel, compressed: PreTrainedModel, windows: Windows) -> Tensor:
    """Return KL(dense ‖ compressed) in nats, summed over the positions that count."""
    with torch.no_grad():
        reference = log_probabilities(dense, windows, torch.float32)
    found = log_probabilities(compressed, windows, torch.float32)
    return summed_kl(reference, found)
