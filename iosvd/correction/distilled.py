"""The anchored refit, and then adapters trained to predict what the dense model predicts (ours)."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from iosvd.correction.adapters import FACTORS, Training, Updated, as_two_layers
from iosvd.correction.anchored import Anchored
from iosvd.correction.base import Corrected, Correction, Given
from iosvd.errors import ConfigError, NumericalError
from iosvd.evaluation.divergence import divergence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distilled(Correction):
    """What the refit cannot reach site by site is lowered for all sites together, by its gradient.

    Adapters of both factors, and of the sites that stay dense, lower the exact KL divergence of
    the compressed model from the dense one on the calibration windows, all tokens of the
    vocabulary: the function that the whitening takes to second order. Merged, nothing is added to
    the ranks. Some windows are held out; if the divergence there is not less afterwards, the
    adapters are dropped and the refit stays as it was.

    What it costs: a copy of the dense model, and per epoch a forward pass of that and a training
    step's work of the compressed one. What was tried, with figures, is in results/LOG.md.
    """

    anchored: Anchored = field(default_factory=Anchored)
    rank: int = 8
    alpha: float = 16.0  # Adapters are scaled by alpha / rank.
    learning_rate: float = 1e-3
    epochs: int = 3
    batch_windows: int = 2  # Per step.
    held_out: float = 0.1  # Share of the windows that are not trained on; at least one.
    seed: int = 0  # Of the adapters, of what is held out, and of the order of the windows.

    def __post_init__(self) -> None:
        self._training()
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out:g} is outside (0, 1)")

    @property
    def needs_metrics(self) -> bool:
        return self.anchored.needs_metrics

    @property
    def adds_bias(self) -> bool:
        return self.anchored.adds_bias

    def __call__(self, given: Given) -> Corrected:
        if len(given.tokens) < 2:
            raise ConfigError("distillation holds out a window: calibration.windows must be 2")
        model, dense = given.model, copy.deepcopy(given.model)
        refitted = self.anchored(given)
        with torch.random.fork_rng(), as_two_layers(model) as pairs:
            torch.manual_seed(self.seed)
            held, fitted = self._divided(given.tokens)
            before = divergence(dense, model, held, given.batch_size).kl
            if before == 0:  # The dense model itself: there is nothing to lower.
                return refitted

            def accept() -> bool:
                try:
                    after = divergence(dense, model, held, given.batch_size).kl
                except NumericalError:
                    return False
                log.info("KL on held-out windows: %.4g, distilled %.4g", before, after)
                return after < before

            factors = [f"{name}.{factor}" for name in pairs for factor in FACTORS]
            whole = [name for name in given.sites if name not in pairs]
            self._training().train_and_merge(
                model=model,
                layers=[*factors, *whole],
                tokens=fitted,
                loss=partial(kl_from, dense),
                batch_size=given.batch_size,
                memory=given.memory,
                accept=accept,
            )
        return Corrected(Updated(refitted.sites, model), refitted.ranks)

    def _divided(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the windows that are held out, and those to train on; one or more of both."""
        order = torch.randperm(len(tokens))
        count = min(max(1, round(self.held_out * len(tokens))), len(tokens) - 1)
        return tokens[order[:count]], tokens[order[count:]]

    def _training(self) -> Training:
        return Training(
            rank=self.rank,
            alpha=self.alpha,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_windows=self.batch_windows,
        )


def kl_from(dense: nn.Module, compressed: nn.Module, windows: Tensor) -> Tensor:
    """Return KL(dense ‖ compressed), nats per token, of windows (windows, length)."""
    with torch.no_grad():
        reference = _log_probabilities(dense, windows)
    found = _log_probabilities(compressed, windows)
    return kl_div(found, reference, log_target=True, reduction="sum") / windows.numel()


def _log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
