"""The next-token loss of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from iosvd.errors import NumericalError
from iosvd.windows import IGNORED, Windows, as_windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


def mean_loss(
    model: PreTrainedModel,
    windows: Tensor | Windows,
    batch_size: int,
    starts: Iterable[int] | None = None,
    context: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> float:
    """Return the mean negative log-likelihood, nats per predicted token.

    Args:
        model: a causal language model.
        windows: of tokens, (windows, length).
        batch_size: windows per forward pass.
        starts: the first window of each batch, for instance wrapped in a progress bar.
        context: of the forward pass that begins at a window.

    Raises:
        NumericalError: a loss is not finite; the windows are named.
    """
    total, windows = 0.0, as_windows(windows)
    with torch.inference_mode():
        for start in range(0, len(windows), batch_size) if starts is None else starts:
            batch = windows[start : start + batch_size]
            with context(start):
                logits = batch.logits(model)
            loss = float(summed_loss(logits, batch.labels))
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the loss of windows {start} to {start + len(batch) - 1} is NaN or infinite;"
                    " try model.dtype=float32 or bfloat16"
                )
            total += loss
    return total / int(windows.predictions.sum())


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats, in float32 or better.

    Args:
        logits: (windows, positions, vocabulary).
        labels: (windows, positions), the token after each position, or IGNORED.
    """
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    predictions = logits.flatten(0, 1).to(accumulate)
    targets = labels.flatten().to(logits.device)
    return cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")
