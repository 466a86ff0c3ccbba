"""The state of a training between epochs, kept in a store so that a later run can resume it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from iosvd.cache.store import Entry, Key, NoStore, Store
from iosvd.system.timing import Stage

log = logging.getLogger(__name__)
SPARED = 300.0  # Seconds of work that an interruption may cost, besides the epoch it falls into.
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Reached:
    """The state of a training between two epochs."""

    masters: Sequence[Tensor]  # Updated in place by the optimizer.
    optimizer: AdamW
    schedule: LambdaLR
    best: Sequence[Tensor]  # Parameters of the epoch with the least loss.
    scales: list[float]  # Of the loss; fewer once gradients have overflowed.
    least: float  # Loss, that of the best.
    epochs: int = 0

    def entry(self, seconds: float) -> Entry:
        """Return the state, which took so many seconds, as a store keeps it."""
        tensors: dict[str, Tensor] = {}
        for number, (master, best) in enumerate(zip(self.masters, self.best, strict=True)):
            moments = {name: self.optimizer.state[master][name] for name in _MOMENTS}
            parts = {"master": master.detach(), "best": best, **moments}
            tensors |= {f"{part}:{number}": value for part, value in parts.items()}
        numbers = {
            "least": self.least,
            "epochs": self.epochs,
            "steps": self.schedule.last_epoch,
            "scale": self.scales[0],
            "rate": self.optimizer.param_groups[0]["lr"],
        }
        return Entry(tensors, Stage(seconds, 0), numbers)

    @torch.no_grad()
    def restore_(self, entry: Entry) -> None:
        """Go on from a state that was kept."""
        numbers = {name: value for name, value in entry.numbers.items() if value is not None}
        steps = int(numbers["steps"])
        for number, (master, best) in enumerate(zip(self.masters, self.best, strict=True)):
            master.copy_(entry.tensors[f"master:{number}"])
            best.copy_(entry.tensors[f"best:{number}"])
            moments = {
                name: torch.empty_like(master).copy_(entry.tensors[f"{name}:{number}"])
                for name in _MOMENTS
            }
            self.optimizer.state[master] = {"step": torch.tensor(float(steps)), **moments}
        for group in self.optimizer.param_groups:
            group["lr"] = numbers["rate"]
        self.schedule.last_epoch = steps
        del self.scales[: self.scales.index(numbers["scale"])]
        self.least = numbers["least"]
        self.epochs = int(numbers["epochs"])


@dataclass
class Trail:
    """Keeps the state after an epoch, unless less than `SPARED` was spent since one was kept.

    A state is four times the size of the trained parameters in float32, and seven times in half
    precision. One is kept at a time; the next is written before it is removed.
    """

    store: Store = NoStore()  # noqa: RUF009 (frozen)
    key: Callable[[int], Key] = lambda epochs: Key("trainings", {"epochs": epochs})
    earlier: float = 0.0  # Seconds that went into the state that was resumed.
    started: float = field(init=False)  # When `resume_` was called; waiting for a lock is no work.
    kept_at: float = field(init=False)

    def resume_(self, reached: Reached, epochs: int) -> bool:
        """Begin: bring a training to the last state that was kept; return whether there is one.

        Args:
            reached: at its start.
            epochs: of the whole training.
        """
        self.started = self.kept_at = time.monotonic()
        for number in range(epochs, 0, -1):
            if (entry := self.store.get(self.key(number))) is not None:
                reached.restore_(entry)
                self.earlier = entry.cost.seconds
                log.info("%d of %d epochs were trained before", number, epochs)
                return True
        return False

    def keep(self, reached: Reached) -> None:
        """Keep a state in place of those before it."""
        now = time.monotonic()
        if not self.store.keeps or now - self.kept_at < SPARED:
            return
        key = self.key(reached.epochs)
        with self.store.locked([key]):
            self.store.put(key, reached.entry(self.earlier + now - self.started))
        forget(self.store, self.key, reached.epochs - 1)
        self.kept_at = time.monotonic()


def forget(store: Store, key: Callable[[int], Key], epochs: int) -> None:
    """Remove the states after at most so many epochs."""
    for number in range(1, epochs + 1):
        store.drop(key(number))
