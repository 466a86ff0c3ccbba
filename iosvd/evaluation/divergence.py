"""The exact KL divergence of a compressed model from the dense one, and its change of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iosvd.errors import NumericalError
from iosvd.models.predictions import at_labels, log_probabilities, summed_kl
from iosvd.system.progress import track
from iosvd.windows import Windows, as_windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """Means over the positions of a text; nats per token."""

    kl: float  # KL(dense ‖ compressed), over all positions.
    loss_change: float  # Of the next-token loss, over those that have a next token.


Context = Callable[[], AbstractContextManager[None]]


@torch.no_grad()
def divergences(
    dense: PreTrainedModel,
    variants: Mapping[str, tuple[PreTrainedModel, Context]],
    windows: Tensor | Windows,
    batch_size: int,
) -> dict[str, Divergence]:
    """Measure several models against the dense one, which runs once.

    Args:
        dense: the reference.
        variants: by name, a model and a context that turns it into the variant; it may be the dense
            model. The context is entered for every batch.
        windows: (windows, length).
        batch_size: windows per forward pass.

    Raises:
        NumericalError: a divergence is not finite.
    """
    windows = as_windows(windows)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in variants}
    starts = range(0, len(windows), batch_size)
    for start in track(starts, len(starts), "divergence", "batch"):
        batch = windows[start : start + batch_size]
        # In float64: small divergences vanish in float32.
        reference = log_probabilities(dense, batch, torch.float64)
        for name, (model, context) in variants.items():
            with context():
                found = log_probabilities(model, batch, torch.float64)
            kl = summed_kl(reference, found)
            change = at_labels(reference - found, batch.chosen(batch.labels)).sum()
            sums[name] += torch.stack([kl, change]).cpu()
    count = torch.stack([windows.positions.sum(), windows.predictions.sum()])
    means = {name: (total / count).tolist() for name, total in sums.items()}
    for name, (kl, change) in means.items():
        if not torch.isfinite(torch.tensor([kl, change])).all():
            raise NumericalError(f"the divergence of {name} is not finite; try model.dtype=float32")
    return {name: Divergence(*values) for name, values in means.items()}


def divergence(
    dense: PreTrainedModel, compressed: PreTrainedModel, windows: Tensor | Windows, batch_size: int
) -> Divergence:
    """Measure one model against the dense one."""
    variants = {"the compressed model": (compressed, nullcontext)}
    return next(iter(divergences(dense, variants, windows, batch_size).values()))
