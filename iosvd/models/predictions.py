"""A model's predictions as log-probabilities, and the KL divergence of two of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div


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
    # In float64, one window at a time: small divergences vanish in float32.
    parts = [
        summed_kl(
            (p.double() / temperature).log_softmax(-1), (q.double() / temperature).log_softmax(-1)
        )
        for p, q in zip(reference, found, strict=True)
    ]
    return torch.stack(parts).sum()
