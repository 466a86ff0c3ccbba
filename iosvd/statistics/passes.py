"""Forward passes up to the head, and gradients of signals that go back from the logits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.errors import NumericalError
from iosvd.models.chain import chained_blocks
from iosvd.models.head import hidden_states, separate_head
from iosvd.models.sites import reading_tokens
from iosvd.statistics.memory import CHUNK_ENTRIES
from iosvd.statistics.signals import Signals
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Body:
    """A model up to its head, or up to its logits if they are more than the head's output."""

    model: PreTrainedModel
    head: nn.Module  # Logits are its output.
    blocks: list[nn.Module]  # That keep no graph.
    through_images: bool = False  # Whether gradients go on into what makes features of images.

    def __call__(self, batch: Windows) -> Tensor:
        """Return the head's inputs (windows, length, d)."""
        if self.through_images:
            batch = batch.with_image_gradients()
        if isinstance(self.head, nn.Identity):
            return batch.logits(self.model)
        return hidden_states(self.model, self.head, batch)


def body_of(
    model: PreTrainedModel, windows: Windows, observed: Iterable[nn.Module], *, backward: bool
) -> Body:
    """Return the body of a model.

    Args:
        model: in the state of `activation_gradients` if there is a backward pass.
        windows: of which a few tokens are used.
        observed: modules whose hooks must see whole batches.
        backward: whether there is a backward pass.
    """
    head = separate_head(model, windows)
    watched = list(observed)
    if head is None or any(head is module for module in watched):
        head = nn.Identity()
    blocks = chained_blocks(model, windows) if backward else []
    if backward and not blocks:
        log.info("blocks cannot run again one by one; the activations of all of them are kept")
    seeing = backward and not reading_tokens(model).issuperset(watched)
    return Body(model, head, blocks, seeing)


def head_gradients(
    head: nn.Module, hidden: Tensor, signals: Signals, check: Callable[[Tensor], None]
) -> list[Tensor]:
    """Return each signal's gradient in the head's inputs, computed a few logits at a time.

    Args:
        head: from hidden states to logits.
        hidden: its inputs (windows, length, d), without a graph.
        signals: of the batch.
        check: raises for logits that are not finite.
    """
    gradients = [torch.empty_like(hidden) for _ in signals.phases]
    positions = max(1, CHUNK_ENTRIES // (len(signals.batch) * signals.vocabulary))
    for start in range(0, hidden.shape[1], positions):
        chunk = hidden[:, start : start + positions].detach().requires_grad_()
        logits = head(chunk)
        check(logits)
        for gradient, scalar in zip(gradients, signals.scalars(logits, start), strict=True):
            (found,) = torch.autograd.grad(scalar, chunk, retain_graph=True)
            gradient[:, start : start + positions] = found
        del logits
    return gradients


def check_logits(logits: Tensor, signals: Signals) -> None:
    """Raise NumericalError if logits are not finite; the windows are named."""
    if not torch.isfinite(logits).all():
        first, last = signals.first_window, signals.first_window + len(signals.batch) - 1
        raise NumericalError(
            f"the logits of calibration windows {first} to {last} have NaN or infinity;"
            " try model.dtype=float32 or bfloat16"
        )
