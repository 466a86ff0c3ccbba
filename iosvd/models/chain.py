"""Forward and backward passes that keep the activations of one decoder block at a time.

The forward pass keeps what each block was called with and no graph. The backward pass runs the
blocks once more, from last to first, and sends every gradient through a block while its graph is
there. This is one forward pass more, and the memory of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iosvd.errors import ModelError
from iosvd.models.calls import Call
from iosvd.models.forward import output_of, replaced_forward, unless_refused
from iosvd.models.sites import decoder_blocks
from iosvd.models.visiting import present
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

_LARGEST_DIFFERENCE = 1e-2  # Relative, in bfloat16.


@dataclass(frozen=True)
class _Visit:
    """One call of a block."""

    block: nn.Module
    hidden: Tensor  # Its input.
    call: Call
    output: Tensor  # A leaf of what follows.


@dataclass(frozen=True)
class Chain:
    """The calls of blocks in one forward pass, in order; without any, the whole graph is kept."""

    visits: list[_Visit] = field(default_factory=list)

    def back(
        self,
        output: Tensor,
        gradients: Sequence[Tensor],
        begin: Callable[[int], None],
        see: Callable[[nn.Module, Sequence[Tensor]], None] = lambda _, __: None,
    ) -> None:
        """Send several gradients of the same output back to the embeddings.

        Args:
            output: of the forward pass; any tensor that depends on the last block.
            gradients: of its shape; each is one backward pass.
            begin: called with a gradient's number before it goes through some part of the model.
            see: called with each block, from last to first, and the gradients of its output.
        """
        while self.visits:
            visit = self.visits.pop()
            gradients = _through(output, visit.output, gradients, begin)
            see(visit.block, gradients)
            hidden = visit.hidden.detach().requires_grad_()
            with present(visit.block):
                gradients = _through(visit.call(visit.block, hidden), hidden, gradients, begin)
            output = visit.hidden
        for number, gradient in enumerate(gradients):
            begin(number)
            torch.autograd.backward(output, gradient, retain_graph=number + 1 < len(gradients))


def _through(
    output: Tensor, leaf: Tensor, gradients: Sequence[Tensor], begin: Callable[[int], None]
) -> list[Tensor]:
    if output is leaf:
        return list(gradients)
    found = []
    for number, gradient in enumerate(gradients):
        begin(number)
        again = number + 1 < len(gradients)
        (one,) = torch.autograd.grad(output, leaf, gradient, retain_graph=again)
        found.append(one)
    return found


@contextmanager
def without_graph(blocks: Sequence[nn.Module]) -> Iterator[Chain]:
    """Let these blocks keep no graph; the chain holds what a backward pass needs."""
    chain = Chain()
    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            forward = partial(_forward, chain, block, block.forward)
            stack.enter_context(replaced_forward(block, forward))
        yield chain


def _forward(
    chain: Chain,
    block: nn.Module,
    plain: Callable[..., Any],
    hidden: Tensor,
    *positional: Any,
    **named: Any,
) -> Any:
    with torch.no_grad():
        found = plain(hidden, *positional, **named)
    output = output_of(found)
    chain.visits.append(_Visit(block, hidden, Call(positional, named), output.requires_grad_()))
    return found


def chained_blocks(model: PreTrainedModel, windows: Windows) -> list[nn.Module]:
    """Return the decoder blocks if earlier ones reach each only through its first argument.

    If they do not (keys and values that are shared among blocks, inputs for every block that are
    made from the embeddings), gradients that go back block by block would be wrong; nor can every
    block run twice. Then no block is returned. Found by comparing both on a few tokens.

    Args:
        model: in the state of `activation_gradients`.
        windows: of which a few tokens are used.
    """
    blocks, few = decoder_blocks(model), windows.few()
    if not blocks:
        return []
    whole = _gradient(model, [], few)
    parts = unless_refused(lambda: _gradient(model, blocks, few), "blocks one by one")
    return blocks if _same(whole, parts) else []


def _same(whole: Tensor, parts: Tensor | None) -> bool:
    # The same operations in the same order: they differ by the order of sums on a GPU at most.
    tolerance = min(8 * torch.finfo(whole.dtype).eps, _LARGEST_DIFFERENCE)
    if parts is None or not torch.isfinite(whole).all():
        return False
    return bool(torch.linalg.norm(parts - whole) <= tolerance * torch.linalg.norm(whole))


def _gradient(model: PreTrainedModel, blocks: Sequence[nn.Module], few: Windows) -> Tensor:
    """Return the gradient in the embeddings of some function of the logits."""
    leaves: list[Tensor] = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda *call: leaves.append(call[-1]))
    try:
        with without_graph(blocks) as chain:
            logits = few.logits(model)
    finally:
        hook.remove()
    if any(visit.call.carries_graph for visit in chain.visits):
        raise ModelError("a block's other arguments depend on earlier blocks")
    draws = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    chain.back(logits, [draws.to(logits)], begin=lambda _: None)
    assert leaves[0].grad is not None
    return leaves[0].grad
