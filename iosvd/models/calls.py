"""The arguments of decoder blocks, and forward passes that stop where these are captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iosvd.models.forward import output_of
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


class _ArrivedError(Exception):
    """Ends a forward pass as soon as the wanted input is captured."""


@dataclass(frozen=True)
class Call:
    """A block's arguments other than the hidden states; they depend only on the batch size."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def carries_graph(self) -> bool:
        """Whether one of them has a gradient."""
        values = (*self.positional, *self.named.values())
        return any(isinstance(value, Tensor) and value.requires_grad for value in values)

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's output."""
        return output_of(block(hidden, *self.positional, **self.named))


def arrival(model: PreTrainedModel, block: nn.Module, batch: Windows) -> tuple[Tensor, Call]:
    """Return what a block is called with; the forward pass ends there."""
    seen: list[tuple[Tensor, Call]] = []

    def see(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((given[0], Call(given[1:], named)))
        raise _ArrivedError

    hook = block.register_forward_pre_hook(see, with_kwargs=True)
    try:
        batch.output(model)
    except _ArrivedError:
        pass
    finally:
        hook.remove()
    return seen[0]


def alike(one: Any, other: Any) -> bool:
    """Whether all tensors in two sets of arguments are equal."""
    if isinstance(one, Call):
        return alike(one.positional, other.positional) and alike(one.named, other.named)
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return all(alike(value, other.get(name)) for name, value in one.items())
    if isinstance(one, tuple | list):
        return all(alike(*pair) for pair in zip(one, other, strict=True))
    return True


def capture_input(
    block: nn.Module, hidden: Tensor, call: Call, name: str, writers: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Run a block until one of its layers is reached.

    Returns:
        The layer's input, and the residual stream that its output would be added to: the block's
        input plus the outputs of the layers named in `writers`.
    """
    stream, seen = [hidden], list[Tensor]()
    with ExitStack() as stack:
        for writer in writers:
            layer = block.get_submodule(writer)
            hook = layer.register_forward_hook(
                lambda *call: stream.append(stream[-1] + call[-1].reshape_as(hidden))
            )
            stack.callback(hook.remove)
        layer = block.get_submodule(name)
        stack.callback(layer.register_forward_pre_hook(_stopping(seen)).remove)
        with suppress(_ArrivedError):
            call(block, hidden)
    return seen[0], stream[-1]


def _stopping(seen: list[Tensor]) -> Any:
    def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])
        raise _ArrivedError

    return see
