"""Change what a model's forward pass computes, for a while."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from iosvd.system.machine import out_of_memory

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
Result = TypeVar("Result")


def unless_refused(compute: Callable[[], Result], what: str) -> Result | None:
    """Return what is computed, None if the model's own code raises an error.

    Models raise all kinds of errors when their blocks are called otherwise than in a forward pass.

    Args:
        compute: runs a part of a model.
        what: is computed, for the log.
    """
    try:
        return compute()
    except Exception as error:
        if out_of_memory(error):
            raise
        log.debug("%s: %s", what, error)
        return None


def output_of(found: Any) -> Tensor:
    """Return the hidden states that a block returns, alone or before other things."""
    first: Tensor = found[0] if isinstance(found, tuple | list) else found
    return first


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else, and restore its forward pass at the end."""
    before = vars(module).get("forward")
    try:
        module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:  # accelerate's hook.
            module.forward = before  # type: ignore[method-assign]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def activation_gradients(model: PreTrainedModel) -> Iterator[None]:
    """The same, but with gradients that flow back to the embeddings' output and to no parameter."""
    asked = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    # The leaf, since no parameter requires a gradient.
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_())
    try:
        with evaluation(model), torch.enable_grad():
            yield
    finally:
        hook.remove()
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
