"""A model's predictions as log-probabilities, and the KL divergence of two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from iosvd.windows import IGNORED, Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

_CHUNK_ENTRIES = 2**23  # Logits in float64 at a time.


def log_probabilities(model: PreTrainedModel, windows: Windows, dtype: torch.dtype) -> Tensor:
    """Return the log-probabilities of all next tokens, (windows, length, vocabulary).

    Those that count, if not all do: (1, positions, vocabulary).

    Args:
        model: a causal language model.
        windows: of tokens.
        dtype: computed in this precision or the model's, whichever is better.
    """
    logits = windows.chosen(windows.logits(model))
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, dtype))


def at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Return the values of the labels, (windows, positions); 0 where a label is IGNORED.

    Args:
        values: (windows, positions, vocabulary), such as log-probabilities.
        labels: (windows, positions).
    """
    labels = labels.to(values.device)
    found = values.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return found.where(labels != IGNORED, 0)


def summed_kl(reference: Tensor, found: Tensor) -> Tensor:
    """Return the sum over tokens of KL(reference ‖ found), nats, of two log-probabilities."""
    return kl_div(found, reference, log_target=True, reduction="sum")


def summed_divergence(reference: Tensor, found: Tensor, temperature: float) -> Tensor:
    """Return the sum over tokens of KL(reference ‖ found), nats, of logits at a temperature.

    Args:
        reference, found: logits (windows, positions, vocabulary).
        temperature: that both are divided by.
    """
    positions = max(1, _CHUNK_ENTRIES // (reference.shape[0] * reference.shape[-1]))
    total = torch.zeros((), dtype=torch.float64, device=found.device)
    for p, q in zip(reference.split(positions, 1), found.split(positions, 1), strict=True):
        # In float64: small divergences vanish in float32.
        first, second = ((x.double() / temperature).log_softmax(-1) for x in (p, q))
        total += summed_kl(first.to(second.device), second)
    return total
