"""Load and calibrate a run's model, and plan the memory of its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iosvd.cache.calibration import Calibration
from iosvd.cache.disk import Cache
from iosvd.cache.store import NoStore, Store
from iosvd.errors import ConfigError
from iosvd.models.chain import chained_blocks
from iosvd.models.forward import activation_gradients
from iosvd.models.loading import hub_revision, load_model
from iosvd.models.sites import decoder_blocks
from iosvd.models.visiting import device_of, visitor_bytes
from iosvd.runs.fingerprints import model_identity
from iosvd.runs.run import Run
from iosvd.statistics.memory import MemoryUse, sums_limit
from iosvd.statistics.needs import Needs
from iosvd.statistics.planning import Outline, activations_of, outline
from iosvd.system.machine import GIB, taken_bytes
from iosvd.windows import Windows, as_windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


def loaded(run: Run) -> PreTrainedModel:
    """Load the run's model on the run's device; compression changes it."""
    resources = run.runtime.resources
    return load_model(
        run.model,
        device_for(resources.device),
        resources.device_map,
        blocks_on_cpu=resources.blocks_on_cpu,
    )


def cache_of(run: Run) -> Cache:
    """Return the cache that a run shares with others."""
    return Cache(Path(run.runtime.output.cache), run.runtime.output.cache_gib * GIB)


def calibration_of(
    run: Run,
    model: PreTrainedModel,
    tokens: Tensor | Windows,
    store: Store = NoStore(),  # noqa: B008 (frozen)
) -> Calibration:
    """Return a loaded model with its calibration windows, as the run divides them.

    Args:
        run: what is measured.
        model: dense.
        tokens: calibration windows (windows, length), or those of images and text.
        store: where statistics, spectra and losses are cached.
    """
    windows = as_windows(tokens)
    whitening, gradient = run.data.calibration.divided(windows)
    return Calibration.of(
        model,
        whitening,
        selection=run.model.sites,
        gradient_tokens=gradient,
        batch_size=batch_size(run, windows),
        memory=memory_use(run, model, windows),
        store=store,
        identity=model_identity(run, hub_revision(run.model)),
    )


def memory_use(run: Run, model: PreTrainedModel, windows: Windows) -> MemoryUse:
    """Return the memory limits of one pass, given the loaded model and its activations."""
    resources, needs = (
        run.runtime.resources,
        run.method.whitening.needs | run.method.allocation.needs,
    )
    devices = {device_of(module) for module in (model, *decoder_blocks(model))}
    where = {torch.device("cpu")} if resources.metrics_on_cpu else devices
    beside = 0
    if where == devices:
        shapes = activations_of(model, run.model.sites, batch_size(run, windows) * windows.length)
        chained = not needs.backward or _is_chain(model, windows)
        beside = shapes.bytes(needs, chained=chained) + visitor_bytes(model)
    limit = sums_limit(resources.memory_gib, where, beside, run.runtime.parallel.workers)
    return MemoryUse(limit, resources.metrics_on_cpu, resources.checkpoint_blocks)


def _is_chain(model: PreTrainedModel, windows: Windows) -> bool:
    with activation_gradients(model):
        return bool(chained_blocks(model, windows))


def batch_size(run: Run, windows: Tensor | Windows) -> int:
    """Return the number of windows in `runtime.batch_tokens`, at least one."""
    return max(1, run.runtime.resources.batch_tokens // as_windows(windows).length)


def device_for(name: str) -> str:
    """Return the device for `runtime.device`: "auto" is the GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"runtime.device={name} is no device; try auto, cpu or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device={name}, but torch sees no CUDA device; set it to cpu")
    return name


@dataclass(frozen=True)
class Planned:
    """Memory that the statistics of a run will take, in bytes."""

    outline: Outline
    needs: Needs
    where: torch.device  # Of the sums.
    activations: int
    limit: float  # Of the sums of one pass.
    passes: tuple[int, ...]  # The sums of each.
    peak: int  # On the model's device, including what the process has there already.

    @property
    def largest(self) -> int:
        """The sums of the largest pass."""
        return max(self.passes, default=0)


def plan_statistics(run: Run, device: torch.device) -> Planned:
    """Plan the statistics of a run on a device, before anything of it is loaded."""
    resources, length = run.runtime.resources, run.data.calibration.seq_len
    shapes = outline(run.model, max(1, resources.batch_tokens // length) * length)
    needs = run.method.whitening.needs | run.method.allocation.needs
    where = torch.device("cpu") if resources.metrics_on_cpu else device
    activations = shapes.activations.bytes(needs)
    weights = shapes.visiting_bytes if resources.blocks_on_cpu else shapes.weight_bytes
    at_home = sum(shapes.block_bytes) if resources.blocks_on_cpu else 0
    beside = activations + weights if where == device else at_home
    limit = sums_limit(resources.memory_gib, [where], beside, run.runtime.parallel.workers)
    passes = shapes.passes(needs, limit)
    peak = taken_bytes(device) + weights
    if passes:
        peak += activations + (max(passes) if where == device else 0)
    return Planned(shapes, needs, where, activations, limit, tuple(passes), peak)
