"""Train one compressed block to return what the dense block returns (METHODS 11.3 and 11.5)."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor, nn

from iosvd.correction.pair import BlockPair
from iosvd.correction.stored_block import BlockUpdate
from iosvd.errors import ConfigError, check_at_least
from iosvd.grams import wide
from iosvd.layers.modules import LowRankLinear
from iosvd.linalg import shrunk
from iosvd.models.visiting import device_of
from iosvd.statistics.kl_metric import KLMetric
from iosvd.types import Site

log = logging.getLogger(__name__)
_WARM_UP = 0.1  # Share of the steps.
_LAST_RATE = 0.1  # Of the learning rate, at the end of its cosine.
_LARGEST_NORM = 1.0  # Of the gradient of the mean squared error.
_SCALES = 8  # Of the error, each a sixteenth of the one before.


class BlockLoss(Enum):
    """Errors of a block's output: mean squared, or weighted by the KL curvature behind it."""

    squared = "squared"
    kl = "kl"


@dataclass(frozen=True)
class Refinement:
    """Options of the training: AdamW on the calibration windows, as AA-SVD's public code has them.

    Twin and dense block read the hidden states in front of each; the error of the twin's output is
    lowered: its mean square, or the KL divergence that it is predicted to cause. After each epoch
    it is measured on windows that are held out, or, without any, on those that are trained on; the
    block keeps the parameters of its best epoch, which may be those it started with.
    """

    loss: BlockLoss = BlockLoss.squared
    shrinkage: float = 0.1  # a of (1 − a) C_b + a mean(diag C_b) I, where the loss is the KL's.
    top_k: int = 0  # Of C_b's Hessian; 0: the whole vocabulary.
    epochs: int = 25
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    batch_windows: int = 32  # Per step.
    dense_sites: bool = True  # Train the weights of sites that stay dense, too.
    others: bool = True  # And norms, biases, and whatever else is no linear layer.
    held_out: float = 0.1  # Share of the windows, the last ones, that choose the epoch.
    seed: int = 0  # Of the order of the windows.

    def __post_init__(self) -> None:
        check_at_least(1, epochs=self.epochs, batch_windows=self.batch_windows)
        check_at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        check_at_least(0, top_k=self.top_k)
        if not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"shrinkage={self.shrinkage:g} is outside [0, 1]")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out:g} is outside [0, 1)")

    @property
    def curvature(self) -> KLMetric | None:
        """The KL metric that weighs errors, if one does."""
        return KLMetric(self.top_k) if self.loss is BlockLoss.kl else None

    def trained_windows(self, windows: int) -> int:
        """Return how many windows are trained on; the others are held out.

        Raises:
            ConfigError: there is none to train on, or none to hold out.
        """
        held = round(self.held_out * windows)
        if held == windows or (self.held_out > 0 and held == 0):
            raise ConfigError(
                f"held_out={self.held_out:g} of {windows} calibration windows leaves none to"
                f" {'train on' if held else 'hold out'}; set correction.held_out or"
                " calibration.windows"
            )
        return windows - held

    def part_sizes(self, windows: int, batch_size: int) -> Collection[int]:
        """Return the numbers of windows that pass through the block together."""
        trained = torch.arange(self.trained_windows(windows))
        steps = trained.split(self.batch_windows)
        judged = self._judged(windows).split(batch_size)
        return {len(part) for part in (*judged, *(p for s in steps for p in s.split(batch_size)))}

    def refine_(self, pair: BlockPair, sites: Mapping[str, Site]) -> BlockUpdate:
        """Train the twin of a block; return its sites and other parameters as they are then.

        Args:
            pair: the block.
            sites: as they are installed in the twin, by their names within the block.
        """
        names = _own_parameters_(pair, sites, self)
        if names:
            _Training(self, pair, names).run_()
        found = {name: _site_of(pair.twin, name, site, names) for name, site in sites.items()}
        inside = tuple(f"{name}." for name in sites)
        others = {n: p.detach() for n, p in names.items() if not n.startswith(inside)}
        return BlockUpdate(found, others)

    def _judged(self, windows: int) -> Tensor:
        """Return the indices of the windows whose error chooses the epoch."""
        trained = self.trained_windows(windows)
        return torch.arange(trained if trained < windows else 0, windows)


@dataclass(frozen=True)
class _Training:
    """The training of one block."""

    options: Refinement
    pair: BlockPair
    parameters: Mapping[str, nn.Parameter]  # In the model's dtype.
    metric: Tensor | None = field(init=False)  # C_b, shrunk.
    masters: Sequence[Tensor] = field(init=False)  # The same in float32 or better.
    scales: list[float] = field(default_factory=lambda: [16.0**-i for i in range(_SCALES)])

    def __post_init__(self) -> None:
        curvature, place = self.pair.curvature, device_of(self.pair.twin)
        metric = None if curvature is None else shrunk(curvature, self.options.shrinkage).to(place)
        object.__setattr__(self, "metric", metric)
        precise = [p.detach().to(wide(p.dtype)) for p in self._all]
        object.__setattr__(self, "masters", [p.requires_grad_() for p in precise])

    @property
    def _all(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    @property
    def _windows(self) -> int:
        return len(self.pair.states.states)

    def run_(self) -> None:
        """Train, and leave the parameters of the epoch with the least error."""
        start = least = self._error()
        best = [parameter.detach().clone() for parameter in self._all]
        for _ in self._epochs():
            error = self._error()
            if not math.isfinite(error):
                log.warning(
                    "the refinement of block %d diverges; lower correction.learning_rate",
                    self.pair.number,
                )
                break
            if error < least:
                least = error
                for kept, parameter in zip(best, self._all, strict=True):
                    kept.copy_(parameter)
        for kept, parameter in zip(best, self._all, strict=True):
            parameter.copy_(kept)
        what = self.options.loss.value
        log.info("block %d: %s error %.4g, refined %.4g", self.pair.number, what, start, least)

    def _epochs(self) -> Iterator[None]:
        from transformers import get_cosine_with_min_lr_schedule_with_warmup as cosine

        options = self.options
        trained = options.trained_windows(self._windows)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.pair.number)
        steps = options.epochs * math.ceil(trained / options.batch_windows)
        optimizer = torch.optim.AdamW(
            self.masters, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        warm_up = min(math.ceil(_WARM_UP * steps), steps - 1)
        schedule = cosine(optimizer, warm_up, steps, min_lr_rate=_LAST_RATE)
        for _ in range(options.epochs):
            order = torch.randperm(trained, generator=generator)
            for batch in order.split(options.batch_windows):
                self._add_gradients_(batch)
                nn.utils.clip_grad_norm_(self.masters, _LARGEST_NORM)
                optimizer.step()
                schedule.step()
                for parameter, master in zip(self._all, self.masters, strict=True):
                    parameter.copy_(master)
            yield

    def _add_gradients_(self, batch: Tensor) -> None:
        """Set the masters' gradients to those of the mean error of some windows."""
        sums = [torch.zeros_like(master) for master in self.masters]
        for part in batch.split(self.pair.states.batch_size):
            for total, gradient in zip(sums, self._gradients(part), strict=True):
                total += gradient
        for master, total in zip(self.masters, sums, strict=True):
            master.grad = total / (len(batch) * self._terms)

    def _gradients(self, windows: Tensor) -> list[Tensor]:
        """Return the gradients of the summed error, in the masters' dtype.

        Those of the mean underflow in half precision, and those of the sum overflow float16 where
        hidden states are large: the error is scaled down until they are finite, and stays so.
        """
        while True:
            scale = self.scales[0]
            with torch.enable_grad():
                error = scale * self._summed_error(windows)
                found = torch.autograd.grad(error, self._all, allow_unused=True)
            gradients = [
                # None: of an expert without a token.
                torch.zeros_like(master) if gradient is None else gradient.to(master) / scale
                for master, gradient in zip(self.masters, found, strict=True)
            ]
            finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
            if finite or len(self.scales) == 1:
                return gradients
            del self.scales[0]

    def _error(self) -> float:
        """Return the mean error of the outputs on the windows that choose the epoch."""
        judged = self.options._judged(self._windows)
        parts = judged.split(self.pair.states.batch_size)
        total = sum(float(self._summed_error(part)) for part in parts)
        return total / (len(judged) * self._terms)

    @property
    def _terms(self) -> int:
        """What a window's error is a mean over: entries of its hidden states, or its tokens."""
        window = self.pair.states.states[0]
        return window.numel() if self.pair.curvature is None else len(window)

    def _summed_error(self, windows: Tensor) -> Tensor:
        pair, device = self.pair, device_of(self.pair.twin)
        hidden, target = (kept.states[windows].to(device) for kept in (pair.states, pair.target))
        output = pair.calls[len(windows)](pair.twin, hidden)
        precise = wide(output.dtype)
        error = output.to(precise) - target.to(precise)
        if self.metric is None:
            return error.square().sum()
        return ((error @ self.metric.to(error)) * error).sum() / 2


def _own_parameters_(
    pair: BlockPair, sites: Mapping[str, Site], options: Refinement
) -> dict[str, nn.Parameter]:
    """Give the twin parameters of its own that are trained, and return them by name.

    Linear layers that are no sites were left out on purpose, and stay as they are.
    """
    trained = {}
    for name, parameter in list(pair.twin.named_parameters()):
        owner, _, last = name.rpartition(".")
        layer = pair.twin.get_submodule(owner)
        if owner in sites and last in ("weight", "left"):
            wanted = sites[owner].factors is not None or options.dense_sites
        else:
            excluded = isinstance(layer, nn.Linear) and owner not in sites
            wanted = options.others and not excluded
        if wanted and parameter.is_floating_point():
            trained[name] = nn.Parameter(parameter.detach().clone())
            layer.register_parameter(last, trained[name])
    return trained


def _site_of(twin: nn.Module, name: str, site: Site, trained: Mapping[str, nn.Parameter]) -> Site:
    """Return a site with what was trained of it."""
    layer = twin.get_submodule(name)
    if f"{name}.bias" in trained:
        site = replace(site, bias=trained[f"{name}.bias"].detach())
    if site.factors is None:
        weight = trained.get(f"{name}.weight")
        return site if weight is None else replace(site, weight=weight.detach())
    assert isinstance(layer, LowRankLinear)
    factors = replace(site.factors, left=layer.left.detach(), right=layer.weight.detach())
    return replace(site, factors=factors, weight=site.weight.detach().to("meta"))
