"""Load, factorise and compress the way a run says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iosvd.cache.disk import Cache
from iosvd.cache.spectra import Factorized
from iosvd.cache.store import NoStore, Store
from iosvd.errors import ConfigError
from iosvd.models.loading import load_model
from iosvd.pipeline import Compressed, compress, factorize
from iosvd.runs.fingerprints import model_identity
from iosvd.runs.run import Run
from iosvd.statistics.memory import MemoryUse, sums_limit
from iosvd.statistics.needs import Needs
from iosvd.statistics.planning import Outline, activations_of, outline
from iosvd.system.machine import GIB, taken_bytes

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel


def loaded(run: Run) -> PreTrainedModel:
    """Load the run's model, on the device that it says; compression will change it."""
    return load_model(run.model, device_for(run.runtime.device), run.runtime.device_map)


def cache_of(run: Run) -> Cache:
    """Return where a run keeps what other runs may need too."""
    return Cache(Path(run.runtime.cache), run.runtime.cache_gib * GIB)


def factorize_as(
    run: Run, model: PreTrainedModel, tokens: Tensor, store: Store | None = None
) -> Factorized:
    """Return the spectra of a loaded model the way a run says."""
    whitening_tokens, gradient_tokens = run.calibration.divided(tokens)
    return factorize(
        model,
        whitening_tokens,
        ratio=run.ratio,
        whitening=run.whitening,
        allocation=run.allocation,
        quantization=run.quantization,
        factorization=run.factorization,
        selection=run.model.sites,
        gradient_tokens=gradient_tokens,
        batch_size=batch_size(run, tokens),
        memory=memory_use(run, model, tokens),
        store=store or NoStore(),
        identity=_identity(run, model),
    )


def compress_as(
    run: Run,
    model: PreTrainedModel,
    tokens: Tensor,
    factorized: Factorized | None = None,
    store: Store | None = None,
) -> Compressed:
    """Compress a loaded model the way a run says."""
    whitening_tokens, gradient_tokens = run.calibration.divided(tokens)
    return compress(
        model,
        whitening_tokens,
        ratio=run.ratio,
        target_kl=run.target_kl,
        whitening=run.whitening,
        allocation=run.allocation,
        correction=run.correction,
        quantization=run.quantization,
        factorization=run.factorization,
        selection=run.model.sites,
        min_rank_fraction=run.min_rank_fraction,
        gradient_tokens=gradient_tokens,
        batch_size=batch_size(run, tokens),
        memory=memory_use(run, model, tokens),
        store=store or NoStore(),
        identity=_identity(run, model),
        factorized=factorized,
    )


def memory_use(run: Run, model: PreTrainedModel, tokens: Tensor) -> MemoryUse:
    """Return what the sums of one pass may take beside the loaded model and its activations."""
    runtime, needs = run.runtime, run.whitening.needs | run.allocation.needs
    devices = {parameter.device for parameter in model.parameters()}
    where = {torch.device("cpu")} if runtime.metrics_on_cpu else devices
    beside = 0
    if where == devices:
        shapes = activations_of(model, run.model.sites, batch_size(run, tokens) * tokens.shape[1])
        beside = shapes.bytes(needs, runtime.checkpoint_blocks)
    limit = sums_limit(runtime.memory_gib, where, beside, runtime.workers)
    return MemoryUse(limit, runtime.metrics_on_cpu, runtime.checkpoint_blocks)


def batch_size(run: Run, windows: Tensor) -> int:
    """Return how many windows make up `runtime.batch_tokens`, at least one."""
    return max(1, run.runtime.batch_tokens // windows.shape[1])


def device_for(name: str) -> str:
    """Return the device that `runtime.device` means: "auto" is the GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"runtime.device={name} is no device; try auto, cpu or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device={name}, but torch sees no CUDA device; set it to cpu")
    return name


def _identity(run: Run, model: PreTrainedModel) -> str:
    return model_identity(run, getattr(model.config, "_commit_hash", None))


@dataclass(frozen=True)
class Planned:
    """What the statistics of a run will take of the memory, in bytes."""

    outline: Outline
    needs: Needs
    where: torch.device  # The sums are.
    activations: int
    limit: float  # Of the sums of one pass.
    passes: tuple[int, ...]  # The sums of each.
    peak: int  # On the model's device, with what the process has there already.

    @property
    def largest(self) -> int:
        """The sums of the largest pass."""
        return max(self.passes, default=0)


def plan_statistics(run: Run, device: torch.device) -> Planned:
    """Plan the statistics of a run on a device, before anything of it is loaded."""
    runtime, length = run.runtime, run.calibration.seq_len
    shapes = outline(run.model, max(1, runtime.batch_tokens // length) * length)
    needs = run.whitening.needs | run.allocation.needs
    where = torch.device("cpu") if runtime.metrics_on_cpu else device
    activations = shapes.activations.bytes(needs, runtime.checkpoint_blocks)
    beside = activations + shapes.weight_bytes if where == device else 0
    limit = sums_limit(runtime.memory_gib, [where], beside, runtime.workers)
    passes = shapes.passes(needs, limit)
    peak = taken_bytes(device) + shapes.weight_bytes
    if passes:
        peak += activations + (max(passes) if where == device else 0)
    return Planned(shapes, needs, where, activations, limit, tuple(passes), peak)
