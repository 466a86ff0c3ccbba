"""Load, factorise and compress the way a run says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iosvd.errors import ConfigError
from iosvd.models import load_model
from iosvd.pipeline import Compressed, Factorized, compress, factorize
from iosvd.run import Run

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel


def loaded(run: Run) -> PreTrainedModel:
    """Load the run's model, on the device that it says; compression will change it."""
    return load_model(run.model, device_for(run.runtime.device), run.runtime.device_map)


def factorize_as(run: Run, model: PreTrainedModel, tokens: Tensor) -> Factorized:
    """Return the spectra of a loaded model the way a run says."""
    whitening_tokens, gradient_tokens = run.calibration.divided(tokens)
    return factorize(
        model,
        whitening_tokens,
        whitening=run.whitening,
        allocation=run.allocation,
        quantization=run.quantization,
        factorization=run.factorization,
        selection=run.model.sites,
        gradient_tokens=gradient_tokens,
        batch_size=batch_size(run, tokens),
        passes=run.runtime.passes,
    )


def compress_as(
    run: Run, model: PreTrainedModel, tokens: Tensor, factorized: Factorized | None = None
) -> Compressed:
    """Compress a loaded model the way a run says."""
    return compress(
        model,
        run.calibration.divided(tokens)[0],
        ratio=run.ratio,
        target_kl=run.target_kl,
        whitening=run.whitening,
        allocation=run.allocation,
        quantization=run.quantization,
        selection=run.model.sites,
        min_rank_fraction=run.min_rank_fraction,
        batch_size=batch_size(run, tokens),
        passes=run.runtime.passes,
        factorized=factorized or factorize_as(run, model, tokens),
    )


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
