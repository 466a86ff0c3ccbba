"""The output head of a causal language model, apart from its body.

Logits of a whole batch take more memory than anything else at a large vocabulary. Where a head is
one module applied to the body's hidden states, they can be computed for a few positions at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iosvd.models.forward import replaced_forward
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

# Options of configurations that change logits after the head, and the values that do nothing.
_CHANGES = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
}


@torch.no_grad()
def separate_head(model: PreTrainedModel, windows: Windows) -> nn.Module | None:
    """Return the head if the logits are its output as it is, else None.

    Models that scale, cap or cast their logits afterwards have no separate head.

    Args:
        model: a causal language model.
        windows: of which a few tokens are used.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        logits = windows.few().logits(model)
    finally:
        hook.remove()
    same = len(seen) == 1 and seen[0].dtype == logits.dtype and seen[0].shape == logits.shape
    # accelerate may have moved the logits.
    return head if same and torch.equal(seen[0].to(logits.device), logits) else None


def has_plain_head(config: Any) -> bool:
    """Whether a model of this configuration is likely to have a separate head; for plans."""
    return all(getattr(config, name, None) in plain for name, plain in _CHANGES.items())


def hidden_states(model: PreTrainedModel, head: nn.Module, batch: Windows) -> Tensor:
    """Return the head's inputs (windows, length, d), attached to the graph of the model's body.

    Args:
        model: a causal language model.
        head: its separate head.
        batch: of windows.
    """
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    with replaced_forward(head, keep):
        batch.output(model)
    return seen[0]
