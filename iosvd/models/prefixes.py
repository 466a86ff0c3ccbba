"""Forward passes that start at the first decoder block that was changed.

A trial truncates one site; the blocks before it compute what they always did. So the outputs of the
dense model's blocks are kept, and the blocks before the changed one return them: half the work on
average, with the same result to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iosvd.models.forward import replaced_forward, unless_refused
from iosvd.models.sites import decoder_blocks
from iosvd.system.machine import free_bytes
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

_SHARE = 0.25  # Share of the free memory that the outputs may take.


@dataclass(frozen=True)
class Prefixes:
    """Outputs of the dense model's blocks for some windows, batch by batch."""

    blocks: tuple[nn.Module, ...]
    outputs: Mapping[int, tuple[Any, ...]]  # By the first window of a batch: of every block.

    @contextmanager
    def from_block(self, first: int, start: int) -> Iterator[None]:
        """Make the blocks before `first` return their stored outputs for the batch at `start`."""
        if first == 0 or start not in self.outputs:
            yield
            return
        known = self.outputs[start][first - 1]
        with ExitStack() as stack:
            for block in self.blocks[:first]:  # Only the last one's output is used.
                stack.enter_context(replaced_forward(block, partial(_answer, known)))
            yield

    def first_changed(self, layers: Iterable[nn.Module]) -> int:
        """Return the first block that holds one of these layers; 0 if a layer is in none."""
        places = {m: i for i, block in enumerate(self.blocks) for m in block.modules()}
        return min((places.get(layer, 0) for layer in layers), default=len(self.blocks))


@torch.inference_mode()
def remember(model: PreTrainedModel, windows: Windows, batch_size: int) -> Prefixes:
    """Run the model once and keep the outputs of its blocks, unless memory is short.

    Args:
        model: dense.
        windows: that pass, in batches.
        batch_size: windows per forward pass.
    """
    blocks, outputs = tuple(decoder_blocks(model)), dict[int, tuple[Any, ...]]()
    size = (
        windows.tokens.numel() * model.config.get_text_config().hidden_size * model.dtype.itemsize
    )
    if size * len(blocks) > _SHARE * free_bytes(model.device):
        return Prefixes(blocks, {})
    for start in range(0, len(windows), batch_size):
        seen: list[Any] = []
        with ExitStack() as stack:
            for block in blocks:
                hook = block.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
                stack.callback(hook.remove)
            windows[start : start + batch_size].output(model)
        outputs[start] = tuple(seen)
    found = Prefixes(blocks, outputs)
    return found if _equal_whole(model, windows[:batch_size], found) else Prefixes(blocks, {})


def _equal_whole(model: PreTrainedModel, batch: Windows, prefixes: Prefixes) -> bool:
    """Whether forward passes of the first batch that start at a block equal whole ones.

    They do not if blocks leave something behind for later ones (shared keys and values).
    """

    def logits(first: int) -> Tensor:
        with prefixes.from_block(first, 0):
            return batch.logits(model)

    whole = logits(0)
    for first in {1, len(prefixes.blocks) - 1} - {0}:
        part = unless_refused(partial(logits, first), "a forward pass that starts at a block")
        if part is None or not torch.equal(part, whole):
            return False
    return True


def _answer(known: Any, *_: Any, **__: Any) -> Any:
    return known
