"""A model's predictions as log-probabilities, and the KL divergence of two of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

_CHUNK_ENTRIES = 2**23  # Logits in float64 at a time.


def log_probabilities(model: nn.Module, windows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the log-probabilities of all next tokens, (windows, length, vocabulary).

    Args:
        model: a causal language model.
        windows: (windows, length), on the model's device.
        dtype: computed in this precision or the model's, whichever is better.
    """
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, dtype))


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
