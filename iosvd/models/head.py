"""The output head of a causal language model, apart from its body.

Logits of a whole batch take more memory than anything else at a large vocabulary. Where a head is
one module applied to the body's hidden states, they can be computed for a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


@torch.no_grad()
def separate_head(model: PreTrainedModel, tokens: Tensor) -> nn.Module | None:
    """Return the head if the logits are its output as it is, else None.

    Models that scale or cap their logits afterwards have no separate head.

    Args:
        model: a causal language model.
        tokens: windows (windows, length), of which a few tokens are used.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        logits = model(input_ids=tokens[:1, :8].to(model.device), use_cache=False).logits
    finally:
        hook.remove()
    return head if len(seen) == 1 and torch.equal(seen[0], logits) else None


def hidden_states(model: PreTrainedModel, head: nn.Module, batch: Tensor) -> Tensor:
    """Return the head's inputs (windows, length, d), attached to the graph of the model's body.

    Args:
        model: a causal language model.
        head: its separate head.
        batch: tokens (windows, length), on the model's device.
    """
    with _bypassed(head):
        found: Tensor = model(input_ids=batch, use_cache=False).logits
    return found


@contextmanager
def _bypassed(head: nn.Module) -> Iterator[None]:
    """Make a head return its input."""
    before = vars(head).get("forward")
    try:
        head.forward = lambda hidden: hidden  # type: ignore[method-assign]
        yield
    finally:
        vars(head).pop("forward", None)
        if before is not None:  # accelerate's hook.
            head.forward = before  # type: ignore[method-assign]
