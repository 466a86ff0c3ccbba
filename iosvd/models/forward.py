"""Replace the forward pass of a module for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module compute something else, and restore its forward pass at the end."""
    before = vars(module).get("forward")
    try:
        module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:  # accelerate's hook.
            module.forward = before  # type: ignore[method-assign]
