"""Token perplexity as the papers measure it (METHODS 9)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from iosvd.errors import NumericalError
from iosvd.models.losses import mean_loss
from iosvd.system.progress import track
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

_LARGEST_LOSS = 700.0  # exp of 710 overflows.


def perplexity(model: PreTrainedModel, windows: Tensor | Windows, batch_size: int = 8) -> float:
    """Return exp of the mean negative log-likelihood of a token given those before it.

    Each window of length L stands alone and gives L − 1 predictions.

    Args:
        model: a causal language model.
        windows: (windows, length), as `evaluation_windows` returns them.
        batch_size: windows per forward pass; it changes the result by rounding only.

    Raises:
        NumericalError: a loss is not finite; the windows are named.
    """
    starts = range(0, len(windows), batch_size)
    mean = mean_loss(model, windows, batch_size, track(starts, len(starts), "perplexity", "batch"))
    if mean > _LARGEST_LOSS:
        raise NumericalError(f"the mean loss of {mean:.0f} nats has no finite perplexity")
    return math.exp(mean)
