"""Collect the statistics of sites in one pass over the calibration set (METHODS 2).

Cost in units of one forward pass: the forward itself 1; each backward pass of the KL metric, or of
the loss of drawn labels, 1, because no parameter asks for a gradient; the true loss another 1, plus
the outer product of its gradient. The Kronecker factors repeat the pass.
Cotangents are of order one at every position and are divided by the number of tokens at the end,
so half precision does not underflow. Sums are float32 or better, on the device of the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.errors import NumericalError
from iosvd.models.blocks import checkpointed
from iosvd.models.head import hidden_states, separate_head
from iosvd.models.sites import shared_inputs
from iosvd.statistics.accumulators import Phase, Sums
from iosvd.statistics.memory import CHUNK_ENTRIES
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.statistics.signals import Signals
from iosvd.system.progress import track

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


def collect(
    model: PreTrainedModel,
    tokens: Tensor,
    sites: Mapping[str, nn.Module],
    needs: Needs,
    batch_size: int = 8,
    *,
    on_cpu: bool = False,
    checkpoint_blocks: bool = False,
) -> dict[str, SiteStatistics]:
    """Return the statistics of the given sites, which may be a subset of the model's.

    Args:
        model: a causal language model; its weights and their `requires_grad` are left as they were.
        tokens: calibration windows (windows, length), without padding.
        sites: target layers by qualified name; linear or compressed.
        needs: which statistics; asking for none costs nothing.
        batch_size: windows per forward pass; it changes results only by rounding.
        on_cpu: keep the sums in main memory, wherever the model is.
        checkpoint_blocks: for each backward pass compute the activations of one decoder block at a
            time again, instead of keeping those of all.

    Raises:
        NumericalError: activations or logits are not finite; the first such site is named.
    """
    if needs == Needs():
        return {name: SiteStatistics(name) for name in sites}
    head = separate_head(model, tokens)
    if head in sites.values():  # The hooks must see it at work on whole batches.
        head = None
    sums = Sums(needs, shared_inputs(model, tokens, sites), on_cpu)
    with _observed(model, sites, sums), checkpointed(model, checkpoint_blocks and needs.backward):
        for number in range(max(1, needs.kronecker_passes)):
            sums.only_kronecker = number > 0
            _pass_over(model, head, tokens, batch_size, sums)
            sums.kronecker.finish_pass(len(tokens), number == needs.kronecker_passes - 1)
    sums.check()
    sums.finish(*tokens.shape)
    return {name: sums.statistics(name) for name in sites}


def _pass_over(
    model: PreTrainedModel, head: nn.Module | None, tokens: Tensor, batch_size: int, sums: Sums
) -> None:
    starts = range(0, len(tokens), batch_size)
    for start in track(starts, len(starts), "statistics", "batch"):
        batch = tokens[start : start + batch_size].to(model.device)
        signals = Signals(
            needs=sums.needs,
            batch=batch,
            first_window=start,
            vocabulary=model.config.get_text_config().vocab_size,
            only_losses=sums.only_kronecker,
        )
        sums.phase, sums.first_window, sums.windows = Phase.INPUTS, start, len(batch)
        if head is None:
            _pass_whole(model, signals, sums)
        else:
            _pass_in_chunks(model, head, signals, sums)
        if start == 0:
            sums.check()  # A broken model fails now, not after the whole pass.


def _pass_whole(model: PreTrainedModel, signals: Signals, sums: Sums) -> None:
    """Run one batch forward, then back-propagate from all of its logits; the hooks sum."""
    logits = model(input_ids=signals.batch, use_cache=False).logits
    _check(logits, signals, sums)
    phases = signals.phases
    for number, scalar in enumerate(signals.scalars(logits, 0)):
        sums.phase = phases[number]
        torch.autograd.backward(scalar, retain_graph=number + 1 < len(phases))


def _pass_in_chunks(model: PreTrainedModel, head: nn.Module, signals: Signals, sums: Sums) -> None:
    """The same, with the logits of a few positions at a time."""
    hidden = hidden_states(model, head, signals.batch)
    if not (phases := signals.phases):
        _check(hidden, signals, sums)
        _check(head(hidden[:, -1:]), signals, sums)
        return
    gradients = [torch.empty_like(hidden) for _ in phases]
    positions = max(1, CHUNK_ENTRIES // (len(signals.batch) * signals.vocabulary))
    for start in range(0, hidden.shape[1], positions):
        chunk = hidden[:, start : start + positions].detach().requires_grad_()
        logits = head(chunk)
        _check(logits, signals, sums)
        for gradient, scalar in zip(gradients, signals.scalars(logits, start), strict=True):
            (found,) = torch.autograd.grad(scalar, chunk, retain_graph=True)
            gradient[:, start : start + positions] = found
        del logits
    for number, gradient in enumerate(gradients):
        sums.phase = phases[number]
        torch.autograd.backward(hidden, gradient, retain_graph=number + 1 < len(phases))


def _check(logits: Tensor, signals: Signals, sums: Sums) -> None:
    if not torch.isfinite(logits).all():
        sums.check()  # Names the site where it began, if a site did.
        first, last = signals.first_window, signals.first_window + len(signals.batch) - 1
        raise NumericalError(
            f"the logits of calibration windows {first} to {last} have NaN or infinity;"
            " try model.dtype=float32 or bfloat16"
        )


@contextmanager
def _observed(model: PreTrainedModel, sites: Mapping[str, nn.Module], sums: Sums) -> Iterator[None]:
    """Attach the hooks, with gradients of activations only; restore everything at the end."""
    asked = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(sums.needs.backward))
        model.eval().requires_grad_(False)
        embeddings = model.get_input_embeddings()
        if sums.needs.backward:
            # The leaf of the activation gradients, since no parameter requires one.
            hook = embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_())
            stack.callback(hook.remove)
        for name, site in sites.items():
            stack.callback(site.register_forward_hook(partial(sums.see_output, name)).remove)
        try:
            yield
        finally:
            model.train(training)
            for parameter, wanted in asked.items():
                parameter.requires_grad_(wanted)
