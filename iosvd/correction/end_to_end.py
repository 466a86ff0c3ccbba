"""Train all decoder blocks together to predict what the dense model predicts (METHODS 11.6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from iosvd.cache.calibration import Calibration
from iosvd.cache.store import Key, get_or_compute
from iosvd.correction.base import CorrectionInputs, CorrectionResult
from iosvd.correction.distilled import Distilled, kl_from
from iosvd.correction.epochs import Trail, forget
from iosvd.correction.stored_block import tensors_of, update_from
from iosvd.correction.training import Fit, Optimization, own_parameters_, update_of
from iosvd.correction.work import CorrectionWork, PlannedModel, training_bytes
from iosvd.errors import ConfigError
from iosvd.layers.replacement import install_, set_parameters_, twin_of
from iosvd.models.blocks import checkpointed
from iosvd.models.sites import decoder_blocks, named_blocks, names_within
from iosvd.models.visiting import device_of
from iosvd.statistics.planning import Work
from iosvd.system.machine import GIB, free_bytes
from iosvd.types import Site

_ADAPTER_FLOATS = 4  # Of an adapter's parameter: itself, its gradient, AdamW's moments.


@dataclass(frozen=True)
class EndToEnd(Optimization):
    """Lower the exact KL divergence from the dense model, over the whole vocabulary.

    The factors themselves are trained, not adapters, so nothing about them is of low rank beyond
    their own rank.

    The divergence is quadratic in the weights' error, so its root says how far there is to go, and
    the learning rate is in proportion to it: at a small divergence a larger rate only adds noise.

    Cost: beside the dense model, what is trained five times in float32 (masters, two gradients,
    AdamW's moments) and three times in the model's dtype; per epoch a forward pass of the dense
    model and a training step's work of the compressed one; in a store, the states of `Trail`.
    """

    epochs: int = 4
    learning_rate: float = 2e-4  # At a divergence of one nat a token, before the training.
    batch_windows: int = 2

    @property
    def rung(self) -> str:
        return "end_to_end"

    def rate(self, start: float) -> float:
        return self.learning_rate * math.sqrt(max(start, 0.0))

    def work(self, planned: PlannedModel) -> CorrectionWork:
        """Return the work of training all blocks together."""
        shapes = planned.shapes
        # The head is not trained: no product for its weight.
        step = shapes.forward + 3 * planned.compressed + 2 * shapes.head
        loss = shapes.forward + planned.compressed + shapes.head
        return CorrectionWork(
            Work(self.multiplications(step, loss), 0),
            training_bytes=training_bytes(planned.compressed, shapes.activations.entry_bytes),
        )

    def check_room(self, inputs: CorrectionInputs) -> None:
        """Raise ConfigError if what is trained does not fit with its optimiser; before any work."""
        model, ranks = inputs.calibration.model, inputs.factorised
        entry_bytes = model.dtype.itemsize
        shapes = inputs.sites.budget.shapes
        kept = sum(s.entries_at(ranks[n]) if n in ranks else s.entries for n, s in shapes.items())
        needed = training_bytes(kept, entry_bytes)
        devices = {device_of(block) for block in decoder_blocks(model)}
        free = sum(map(free_bytes, devices))
        if needed <= free:
            return
        rank = Distilled().rank
        adapted = sum(rank * (s.m + s.n + 2 * ranks.get(n, 0)) for n, s in shapes.items())
        instead = entry_bytes * kept + 4 * _ADAPTER_FLOATS * adapted
        raise ConfigError(
            f"end-to-end training keeps {needed / GIB:.2f} GiB beside the dense model, and"
            f" {(needed - free) / GIB:.2f} GiB are missing; take adapters, which keep"
            f" {instead / GIB:.2f} (correction=distilled), or leave it out"
            " (correction.end_to_end=null)"
        )

    def train(
        self, calibration: Calibration, start: CorrectionResult, key: Callable[[int], Key]
    ) -> CorrectionResult:
        """Return the result of a correction after the training; the dense model stays as it is.

        An interrupted training resumes at an epoch that was kept.

        Args:
            calibration: its store keeps the training.
            start: the correction that the training starts from.
            key: of the state after some epochs; 0: of the result.
        """
        store = calibration.store
        trail = Trail(store, key)
        train = partial(self._trained, calibration, start, trail)
        entry, now = get_or_compute(store, key(0), key(0), train, lambda: trail.earlier)
        forget(store, key, self.epochs)
        # In main memory, like all truncated sites: blocks may lie on several devices.
        update = update_from(entry.tensors, start.sites, torch.device("cpu"))
        spent = trail.earlier if now else entry.cost.seconds
        costs = [*start.costs, replace(entry.cost, seconds=spent)]
        parameters = {**start.parameters, **update.parameters}
        return replace(start, sites=update.sites, parameters=parameters, costs=costs)

    def _trained(
        self, calibration: Calibration, start: CorrectionResult, trail: Trail
    ) -> dict[str, Tensor]:
        dense, windows = calibration.model, calibration.windows
        twin = twin_of(dense)
        install_(twin, start.sites)
        set_parameters_(twin, start.parameters)
        trained = _of_blocks_(twin, start.sites, self)

        def loss(chosen: Tensor) -> Tensor:
            return kl_from(dense, twin, windows[chosen])

        with checkpointed(twin, calibration.memory.checkpoint_blocks):
            Fit(
                options=self,
                parameters=list(trained.values()),
                loss=loss,
                terms=windows.positions,
                batch_size=calibration.batch_size,
                what="KL divergence, end to end",
                trail=trail,
            ).run_()
        return tensors_of(update_of(twin, start.sites, trained), dense)


def _of_blocks_(
    twin: nn.Module, sites: Mapping[str, Site], options: Optimization
) -> dict[str, nn.Parameter]:
    """Give the decoder blocks parameters of their own, and return them by name in the model."""
    found = {}
    for start, block in named_blocks(twin).items():
        inside = {name: sites[full] for name, full in names_within(start, sites).items()}
        for name, parameter in own_parameters_(block, inside, options).items():
            found[f"{start}{name}"] = parameter
    return found
