"""Train parameters of compressed layers by gradient, and keep those of the best epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from iosvd.correction.epochs import Reached, Trail
from iosvd.correction.stored_block import BlockUpdate
from iosvd.errors import ConfigError, NumericalError, check_at_least
from iosvd.grams import wide
from iosvd.layers.modules import LowRankLinear
from iosvd.system.progress import track
from iosvd.types import Site

log = logging.getLogger(__name__)
_WARM_UP = 0.1  # Share of the steps.
_LAST_RATE = 0.1  # Of the learning rate, at the end of its cosine.
_LARGEST_NORM = 1.0  # Of the gradient of the mean loss.
_SCALES = 8  # Of the loss, each a sixteenth of the one before.


@dataclass(frozen=True)
class Optimization:
    """Options of a training: AdamW on the calibration windows in random order (METHODS 11.3).

    After each epoch the loss is measured on windows that are held out, or, without any, on those
    that are trained on. The parameters of the best epoch are kept, which may be those at the start.
    """

    epochs: int = 25  # AA-SVD's public code's, like the next three.
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    batch_windows: int = 32  # Per step.
    dense_sites: bool = True  # Train the weights of sites that stay dense, too.
    others: bool = True  # And norms, biases, and other vectors.
    held_out: float = 0.1  # Share of the windows, the last ones, that choose the epoch.
    seed: int = 0  # Of the order of the windows.

    def __post_init__(self) -> None:
        check_at_least(1, epochs=self.epochs, batch_windows=self.batch_windows)
        check_at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out:g} is outside [0, 1)")

    @property
    def rung(self) -> str:
        """The name of these options within `correction`."""
        raise NotImplementedError

    def rate(self, start: float) -> float:
        """Return the learning rate of a training whose loss is `start` before it."""
        return self.learning_rate

    def multiplications(self, step: float, loss: float) -> float:
        """Return the multiplications of the training per calibration token.

        Args:
            step: those of a training step, per token of its windows.
            loss: those of measuring the loss, at the start and after each epoch.
        """
        judged = self.held_out or 1.0
        return self.epochs * (1 - self.held_out) * step + (self.epochs + 1) * judged * loss

    def trained_windows(self, windows: int) -> int:
        """Return how many windows are trained on; the others are held out.

        Raises:
            ConfigError: there is none to train on, or none to hold out.
        """
        held = round(self.held_out * windows)
        if held == windows or (self.held_out > 0 and held == 0):
            raise ConfigError(
                f"held_out={self.held_out:g} of {windows} calibration windows leaves none to"
                f" {'train on' if held else 'hold out'}; set correction.{self.rung}.held_out or"
                " calibration.windows"
            )
        return windows - held

    def judged_windows(self, windows: int) -> Tensor:
        """Return the indices of the windows whose loss chooses the epoch."""
        trained = self.trained_windows(windows)
        return torch.arange(trained if trained < windows else 0, windows)

    def part_sizes(self, windows: int, batch_size: int) -> Collection[int]:
        """Return the numbers of windows that pass through the model together."""
        steps = torch.arange(self.trained_windows(windows)).split(self.batch_windows)
        judged = self.judged_windows(windows).split(batch_size)
        return {len(part) for part in (*judged, *(p for s in steps for p in s.split(batch_size)))}


@dataclass(frozen=True)
class Fit:
    """One training."""

    options: Optimization
    parameters: Sequence[nn.Parameter]  # In the model's dtype.
    loss: Callable[[Tensor], Tensor]  # Of the indices of windows: the sum of their terms.
    terms: Tensor  # Their number, by window of the calibration set.
    batch_size: int
    what: str  # Is trained, for the log.
    number: int = 0  # Of the training, which draws its order with the seed.
    trail: Trail = field(default_factory=Trail)  # For a training that takes long.
    masters: Sequence[Tensor] = field(init=False)  # The parameters in float32 or better.
    scales: list[float] = field(default_factory=lambda: [16.0**-i for i in range(_SCALES)])

    def __post_init__(self) -> None:
        precise = [p.detach().to(wide(p.dtype)) for p in self.parameters]
        object.__setattr__(self, "masters", [p.requires_grad_() for p in precise])

    @torch.no_grad()
    def run_(self) -> None:
        """Train, and leave the parameters of the epoch with the least loss."""
        if not self.parameters:
            return
        batches, start = self._batches(), self._start()
        reached = self._prepared(len(batches), start)
        if self.trail.resume_(reached, self.options.epochs):
            self._set_(self.masters)
        for _ in self._epochs(batches, reached):
            found = self._judged()
            if not math.isfinite(found):
                rate = f"correction.{self.options.rung}.learning_rate"
                log.warning("the training of %s diverges; lower %s", self.what, rate)
                break
            if found < reached.least:
                reached.least = found
                for kept, parameter in zip(reached.best, self.parameters, strict=True):
                    kept.copy_(parameter)
            if reached.epochs < self.options.epochs:
                self.trail.keep(reached)
        self._set_(reached.best)
        log.info("%s: %.4g, trained %.4g", self.what, start, reached.least)

    def _batches(self) -> list[Tensor]:
        """Return the windows of every step of all epochs."""
        options = self.options
        trained = options.trained_windows(len(self.terms))
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.number)
        return [
            batch
            for _ in range(options.epochs)
            for batch in torch.randperm(trained, generator=generator).split(options.batch_windows)
        ]

    def _start(self) -> float:
        start = self._judged()
        if not math.isfinite(start):
            raise NumericalError(
                f"the {self.what} is not finite before any training; try model.dtype=bfloat16"
            )
        return start

    def _prepared(self, steps: int, start: float) -> Reached:
        from transformers import get_cosine_with_min_lr_schedule_with_warmup as cosine

        options = self.options
        optimizer = torch.optim.AdamW(
            self.masters, lr=options.rate(start), weight_decay=options.weight_decay
        )
        warm_up = min(math.ceil(_WARM_UP * steps), steps - 1)
        schedule = cosine(optimizer, warm_up, steps, min_lr_rate=_LAST_RATE)
        best = [parameter.detach().clone() for parameter in self.parameters]
        return Reached(self.masters, optimizer, schedule, best, self.scales, start)

    def _epochs(self, batches: Sequence[Tensor], reached: Reached) -> Iterator[None]:
        """Take the steps that are left; yield after each epoch."""
        by_epoch = len(batches) // self.options.epochs
        left = batches[reached.epochs * by_epoch :]
        for number, batch in enumerate(track(left, len(left), self.what, "step"), start=1):
            self._add_gradients_(batch)
            nn.utils.clip_grad_norm_(self.masters, _LARGEST_NORM)
            reached.optimizer.step()
            reached.schedule.step()
            self._set_(self.masters)
            if number % by_epoch == 0:
                reached.epochs += 1
                yield

    def _set_(self, values: Sequence[Tensor]) -> None:
        """Give the parameters these values."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _add_gradients_(self, batch: Tensor) -> None:
        """Set the masters' gradients to those of the mean loss of some windows."""
        for master in self.masters:
            master.grad = None
        for part in batch.split(self.batch_size):
            for master, gradient in zip(self.masters, self._gradients(part), strict=True):
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        for master in self.masters:
            assert master.grad is not None
            master.grad.div_(int(self.terms[batch].sum()))

    def _gradients(self, windows: Tensor) -> list[Tensor]:
        """Return the gradients of the summed loss, in the masters' dtype.

        Those of the mean underflow in half precision, and those of the sum overflow float16 where
        hidden states are large: the loss is scaled down until they are finite, and stays so.
        """
        while True:
            scale = self.scales[0]
            with torch.enable_grad():
                loss = scale * self.loss(windows)
                found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            gradients = [
                # None: of an expert without a token.
                torch.zeros_like(master) if gradient is None else gradient.to(master) / scale
                for master, gradient in zip(self.masters, found, strict=True)
            ]
            finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
            if finite or len(self.scales) == 1:
                return gradients
            del self.scales[0]

    def _judged(self) -> float:
        """Return the mean loss of the windows that choose the epoch."""
        judged = self.options.judged_windows(len(self.terms))
        total = sum(float(self.loss(part)) for part in judged.split(self.batch_size))
        return total / int(self.terms[judged].sum())


def own_parameters_(
    twin: nn.Module, sites: Mapping[str, Site], options: Optimization
) -> dict[str, nn.Parameter]:
    """Give a twin parameters of its own that are trained, and return them by name.

    Matrices that are no sites were left out on purpose, and stay as they are.

    Args:
        twin: a compressed block.
        sites: as they are installed in it, by their names within it.
        options: say which parameters.
    """
    trained = {}
    for name, parameter in list(twin.named_parameters()):
        owner, _, last = name.rpartition(".")
        layer = twin.get_submodule(owner)
        if owner in sites and last in ("weight", "left"):
            wanted = sites[owner].factors is not None or options.dense_sites
        else:
            wanted = options.others and parameter.dim() < 2
        if wanted and parameter.is_floating_point():
            trained[name] = nn.Parameter(parameter.detach().clone())
            layer.register_parameter(last, trained[name])
    return trained


def update_of(
    twin: nn.Module, sites: Mapping[str, Site], trained: Mapping[str, nn.Parameter]
) -> BlockUpdate:
    """Return a twin's sites and other parameters as they are after a training."""
    found = {name: _site_of(twin, name, site, trained) for name, site in sites.items()}
    inside = tuple(f"{name}." for name in sites)
    others = {n: p.detach() for n, p in trained.items() if not n.startswith(inside)}
    return BlockUpdate(found, others)


def _site_of(twin: nn.Module, name: str, site: Site, trained: Mapping[str, nn.Parameter]) -> Site:
    layer = twin.get_submodule(name)
    if f"{name}.bias" in trained:
        site = replace(site, bias=trained[f"{name}.bias"].detach())
    if site.factors is None:
        weight = trained.get(f"{name}.weight")
        return site if weight is None else replace(site, weight=weight.detach())
    assert isinstance(layer, LowRankLinear)
    factors = replace(site.factors, left=layer.left.detach(), right=layer.weight.detach())
    return replace(site, factors=factors, weight=site.weight.detach().to("meta"))
