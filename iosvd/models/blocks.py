"""Hidden states carried from one decoder block to the next.

A computation that changes the model block by block takes a few forward passes in all, instead of
one per site, and holds one block and the hidden states in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iosvd.errors import ModelError
from iosvd.models.calls import Call, alike, arrival
from iosvd.models.forward import output_of, replaced_forward, unless_refused
from iosvd.models.sites import decoder_blocks
from iosvd.models.visiting import device_of
from iosvd.system.machine import free_bytes
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

_LARGEST_ERROR = 1e-2  # Relative, in half precision; another computation differs by far more.
_INSTEAD = "choose correction=none, projected_gradient or lora"
SHARE = 0.2  # Share of the free memory that one set of hidden states may take.


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states of all calibration windows in front of one block, (windows, length, d)."""

    states: Tensor  # On the model's device, in main memory, or mapped from a file.
    batch_size: int
    device: torch.device  # The model's.
    limit_bytes: float | None = None
    filled: Tensor | None = None  # (windows, length), False for padding; None: there is none.

    @property
    def width(self) -> int:
        return self.states.shape[-1]

    @property
    def token_counts(self) -> Tensor:
        """The number of tokens that are no padding, by window."""
        if self.filled is None:
            return torch.full((len(self.states),), self.states.shape[1])
        return self.filled.sum(1)

    def rows(self, values: Tensor, which: slice | Tensor) -> Tensor:
        """Return those of some windows' values that do not belong to padding.

        Args:
            values: (windows, length, width).
            which: windows they belong to.
        """
        return values if self.filled is None else values[self.filled[which].to(values.device)]

    def batches(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Yield the states batch by batch, on a device."""
        for start in range(0, len(self.states), self.batch_size):
            where = slice(start, start + self.batch_size)
            yield where, self.states[where].to(device)

    def pass_(
        self, block: nn.Module, calls: Mapping[int, Call], names: Sequence[str] = ()
    ) -> dict[str, HiddenStates]:
        """Replace the states by the outputs of a block.

        Returns:
            The inputs of the named layers of the block; the block itself is "".
        """
        reached: dict[str, HiddenStates] = {}
        for where, hidden in self.batches(device_of(block)):
            with ExitStack() as stack:
                for name in names:
                    see = partial(self._see, reached, name, where)
                    hook = block.get_submodule(name).register_forward_pre_hook(see)
                    stack.callback(hook.remove)
                self.states[where] = calls[len(hidden)](block, hidden)
        return reached

    def _see(
        self,
        reached: dict[str, HiddenStates],
        name: str,
        where: slice,
        _: nn.Module,
        given: tuple[Tensor, ...],
    ) -> None:
        if name not in reached:
            reached[name] = self._beside(given[0].shape[-1])
        states = reached[name].states
        states[where] = given[0].reshape_as(states[where])

    def _beside(self, width: int) -> HiddenStates:
        """Allocate the inputs of a layer of this width, for the same windows."""
        shape = (*self.states.shape[:2], width)
        states = _room(shape, self.states.dtype, self.device, self.limit_bytes)
        return replace(self, states=states)


def hidden_states_of(
    model: PreTrainedModel, windows: Windows, batch_size: int, limit_bytes: float | None = None
) -> HiddenStates:
    """Return the inputs of the first block, on the device or wherever they fit.

    Args:
        model: a causal language model.
        windows: that pass, in batches.
        batch_size: windows per forward pass.
        limit_bytes: of the model's device, and then of main memory; larger states are mapped from
            a temporary file. None: a fifth of what is free.
    """
    first = decoder_blocks(model)[0]
    width = model.config.get_text_config().hidden_size
    states = _room((*windows.tokens.shape, width), model.dtype, model.device, limit_bytes)
    for start in range(0, len(windows), batch_size):
        where = slice(start, start + batch_size)
        states[where], _ = arrival(model, first, windows[where])
    return HiddenStates(states, batch_size, model.device, limit_bytes, windows.filled)


@torch.no_grad()
def _check_alike(model: PreTrainedModel, windows: Windows) -> None:
    """Raise ModelError if the blocks' other arguments differ from window to window."""
    first = decoder_blocks(model)[0]
    _, expected = arrival(model, first, windows[:1])
    for window in windows[1:].split(1):
        _, call = arrival(model, first, window)
        if not alike(call, expected):
            raise ModelError(
                f"the blocks of {type(model).__name__} get positions or masks that depend on where"
                f" images stand in a window, so hidden states cannot be carried; {_INSTEAD}"
            )


def calls_of(
    model: PreTrainedModel, windows: Windows, batch_size: int, sizes: Collection[int] = ()
) -> list[dict[int, Call]]:
    """Return each block's other arguments, by the number of windows in a batch.

    Args:
        model: a causal language model.
        windows: that pass in order, in batches.
        batch_size: windows of such a batch.
        sizes: of further batches.

    Raises:
        ModelError: hidden states cannot be carried from block to block with these.
    """
    _check_carried(model, windows[:2])
    if windows.beside:
        _check_alike(model, windows)
    own = {min(batch_size, len(windows)), len(windows) % batch_size} - {0}
    return _calls(model, windows, own | set(sizes))


def _calls(
    model: PreTrainedModel, windows: Windows, sizes: Collection[int]
) -> list[dict[int, Call]]:
    blocks = decoder_blocks(model)
    calls: list[dict[int, Call]] = [{} for _ in blocks]
    for size in sizes:
        with ExitStack() as stack:
            for block, found in zip(blocks, calls, strict=True):

                def see(
                    _: nn.Module,
                    given: tuple[Any, ...],
                    named: dict[str, Any],
                    found: dict[int, Call] = found,
                    size: int = size,
                ) -> None:
                    found[size] = Call(given[1:], named)

                stack.callback(block.register_forward_pre_hook(see, with_kwargs=True).remove)
            windows[:size].output(model)
    return calls


@torch.no_grad()
def _check_carried(model: PreTrainedModel, windows: Windows) -> None:
    """Check on these windows that states carried from block to block are those of a forward pass.

    They are not where blocks read what earlier ones leave behind (shared keys and values), or have
    other arguments that depend on the tokens (an embedding for every layer).

    Raises:
        ModelError: they are not, blocks share layers, or the model has no list of blocks.
    """
    blocks = decoder_blocks(model)
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks; {_INSTEAD}")
    weights = [id(parameter) for block in blocks for parameter in block.parameters()]
    if len(set(weights)) < len(weights):
        raise ModelError(f"blocks of {type(model).__name__} share layers; {_INSTEAD}")
    whole = _plain(model, blocks[-1], windows)
    carried = unless_refused(lambda: _carried(model, blocks, windows), "carried hidden states")
    if carried is None or not _same(carried.to(whole), whole):
        raise ModelError(
            f"the blocks of {type(model).__name__} get more from each other or from the tokens than"
            f" hidden states, so these cannot be carried block by block; {_INSTEAD}"
        )


def _same(carried: Tensor, whole: Tensor) -> bool:
    if carried.shape != whole.shape:  # Blocks that run several times.
        return False
    error = torch.linalg.norm(carried - whole)
    return bool(error <= _LARGEST_ERROR * torch.linalg.norm(whole))


def _plain(model: PreTrainedModel, last: nn.Module, windows: Windows) -> Tensor:
    """Return the last block's outputs in forward passes of one window each."""
    seen: list[Tensor] = []

    def see(_: nn.Module, __: tuple[Tensor, ...], found: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output_of(found))

    hook = last.register_forward_hook(see)
    try:
        for window in windows.split(1):
            window.output(model)
    finally:
        hook.remove()
    return torch.cat(seen)


def _carried(model: PreTrainedModel, blocks: Sequence[nn.Module], windows: Windows) -> Tensor:
    """Return the same, carried from block to block."""
    carried = hidden_states_of(model, windows, 1)
    for block, calls in zip(blocks, _calls(model, windows, [1]), strict=True):
        carried.pass_(block, calls)
    return carried.states


def _room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, limit_bytes: float | None
) -> Tensor:
    """Return an empty tensor on the device, else in main memory, else mapped from a file."""
    count = int(torch.Size(shape).numel())
    for place in dict.fromkeys([device, torch.device("cpu")]):
        limit = SHARE * free_bytes(place) if limit_bytes is None else limit_bytes
        if count * dtype.itemsize <= limit:
            return torch.empty(shape, dtype=dtype, device=place)
    with tempfile.TemporaryDirectory(prefix="iosvd-") as folder:
        # The file is unlinked when this block ends; its bytes are freed with the tensor.
        path = str(Path(folder) / "states")
        return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)


@contextmanager
def checkpointed(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Keep only the input of each decoder block, and recompute its activations when needed."""
    # Not transformers' own: it works in training mode only, where dropout would be on.
    with ExitStack() as stack:
        for block in decoder_blocks(model) if wanted else []:
            again = partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(replaced_forward(block, again))
        yield
