"""Collect the statistics of sites in one pass over the calibration set (METHODS 2).

Cost in units of one forward pass: the forward itself 1, and once more block by block if there is a
backward pass; each backward pass of the KL metric, or of the loss of drawn labels, 1, because no
parameter asks for a gradient; the true loss another 1, plus the outer product of its gradient. The
Kronecker factors repeat the pass.
Cotangents are of order one at every position and are divided by the number of tokens at the end,
so half precision does not underflow. Sums are float32 or better, on the device of the site.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.errors import NumericalError
from iosvd.models.chain import chained_blocks, without_graph
from iosvd.models.forward import activation_gradients, evaluation
from iosvd.models.head import hidden_states, separate_head
from iosvd.models.sites import shared_inputs
from iosvd.statistics.accumulators import Phase, Sums
from iosvd.statistics.memory import CHUNK_ENTRIES
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.statistics.signals import Signals
from iosvd.system.progress import track

log = logging.getLogger(__name__)

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
) -> dict[str, SiteStatistics]:
    """Return the statistics of the given sites, which may be a subset of the model's.

    Args:
        model: a causal language model; its weights and their `requires_grad` are left as they were.
        tokens: calibration windows (windows, length), without padding.
        sites: target layers by qualified name; linear or compressed.
        needs: which statistics; asking for none costs nothing.
        batch_size: windows per forward pass; it changes results only by rounding.
        on_cpu: keep the sums in main memory, wherever the model is.

    Raises:
        NumericalError: activations or logits are not finite; the first such site is named.
    """
    if needs == Needs():
        return {name: SiteStatistics(name) for name in sites}
    sums = Sums(needs, shared_inputs(model, tokens, sites), on_cpu)
    with activation_gradients(model) if needs.backward else evaluation(model):
        body = _body(model, tokens, sites, needs)
        with _observed(sites, sums):
            for number in range(max(1, needs.kronecker_passes)):
                sums.only_kronecker = number > 0
                _pass_over(body, tokens, batch_size, sums)
                sums.kronecker.finish_pass(len(tokens), number == needs.kronecker_passes - 1)
    sums.check()
    sums.check_reached(sites)
    sums.finish(*tokens.shape)
    return {name: sums.statistics(name) for name in sites}


@dataclass(frozen=True)
class _Body:
    """A model up to its head, or up to its logits if they are more than the head's output."""

    model: PreTrainedModel
    head: nn.Module  # Logits are its output.
    blocks: list[nn.Module]  # That keep no graph.

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the head's inputs (windows, length, d)."""
        if isinstance(self.head, nn.Identity):
            return self.model(input_ids=batch, use_cache=False).logits
        return hidden_states(self.model, self.head, batch)


def _body(
    model: PreTrainedModel, tokens: Tensor, sites: Mapping[str, nn.Module], needs: Needs
) -> _Body:
    head = separate_head(model, tokens)
    if head is None or head in sites.values():  # The hooks must see it at work on whole batches.
        head = nn.Identity()
    blocks = chained_blocks(model, tokens) if needs.backward else []
    if needs.backward and not blocks:
        log.info("blocks cannot run again one by one; the activations of all of them are kept")
    return _Body(model, head, blocks)


def _pass_over(body: _Body, tokens: Tensor, batch_size: int, sums: Sums) -> None:
    model = body.model
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
        if not (signals.phases or (sums.needs.of_inputs and not sums.only_kronecker)):
            continue  # Beyond the windows of the gradient there is nothing to see.
        sums.phase, sums.first_window = Phase.INPUTS, start
        sums.windows, sums.length = batch.shape
        sums.tokens += 0 if sums.only_kronecker else batch.numel()
        _pass_batch(body, signals, sums)
        if start == 0:
            sums.check()  # A broken model fails now, not after the whole pass.


def _pass_batch(body: _Body, signals: Signals, sums: Sums) -> None:
    """Run one batch forward and back-propagate every signal; the hooks sum."""
    phases = signals.phases
    if not phases:
        with torch.no_grad():
            hidden = body(signals.batch)
            _check(hidden, signals, sums)
            _check(body.head(hidden[:, -1:]), signals, sums)
        return
    with without_graph(body.blocks) as chain:
        hidden = body(signals.batch)

    def begin(number: int) -> None:
        sums.phase = phases[number]

    gradients = _gradients(body.head, hidden.detach(), signals, sums)
    begin(0)  # Blocks run again, but their inputs have been seen.
    chain.back(hidden, gradients, begin)


def _gradients(head: nn.Module, hidden: Tensor, signals: Signals, sums: Sums) -> list[Tensor]:
    """Return each signal's gradient in the head's inputs, computed a few logits at a time."""
    gradients = [torch.empty_like(hidden) for _ in signals.phases]
    positions = max(1, CHUNK_ENTRIES // (len(signals.batch) * signals.vocabulary))
    for start in range(0, hidden.shape[1], positions):
        chunk = hidden[:, start : start + positions].detach().requires_grad_()
        logits = head(chunk)
        _check(logits, signals, sums)
        for gradient, scalar in zip(gradients, signals.scalars(logits, start), strict=True):
            (found,) = torch.autograd.grad(scalar, chunk, retain_graph=True)
            gradient[:, start : start + positions] = found
        del logits
    return gradients


def _check(logits: Tensor, signals: Signals, sums: Sums) -> None:
    if not torch.isfinite(logits).all():
        sums.check()  # Names the site where it began, if a site did.
        first, last = signals.first_window, signals.first_window + len(signals.batch) - 1
        raise NumericalError(
            f"the logits of calibration windows {first} to {last} have NaN or infinity;"
            " try model.dtype=float32 or bfloat16"
        )


@contextmanager
def _observed(sites: Mapping[str, nn.Module], sums: Sums) -> Iterator[None]:
    """Attach the hooks for a while."""
    with ExitStack() as stack:
        for name, site in sites.items():
            stack.callback(site.register_forward_hook(partial(sums.see_output, name)).remove)
        yield
