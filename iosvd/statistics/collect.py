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
from iosvd.models.losses import summed_loss
from iosvd.models.sites import shared_inputs
from iosvd.statistics.accumulators import Phase, Sums
from iosvd.statistics.kl_metric import cotangents
from iosvd.statistics.needs import Needs, SiteStatistics
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
    sums = Sums(needs, shared_inputs(model, tokens, sites), on_cpu)
    with _observed(model, sites, sums), checkpointed(model, checkpoint_blocks and needs.backward):
        for number in range(max(1, needs.kronecker_passes)):
            sums.only_kronecker = number > 0
            _pass_over(model, tokens, batch_size, sums)
            sums.kronecker.finish_pass(len(tokens), number == needs.kronecker_passes - 1)
    sums.check()
    sums.finish(*tokens.shape)
    return {name: sums.statistics(name) for name in sites}


def _pass_over(model: PreTrainedModel, tokens: Tensor, batch_size: int, sums: Sums) -> None:
    starts = range(0, len(tokens), batch_size)
    for start in track(starts, len(starts), "statistics", "batch"):
        _pass(model, tokens[start : start + batch_size], start, sums)
        if start == 0:
            sums.check()  # A broken model fails now, not after the whole pass.


def _pass(model: PreTrainedModel, batch: Tensor, first_window: int, sums: Sums) -> None:
    """Run one batch forward, then back-propagate what is needed; the hooks sum."""
    batch = batch.to(model.device)
    sums.phase, sums.first_window, sums.windows = Phase.INPUTS, first_window, len(batch)
    logits = model(input_ids=batch, use_cache=False).logits
    if not torch.isfinite(logits).all():
        sums.check()  # Names the site where it began, if a site did.
        raise NumericalError(
            f"the logits of calibration windows {first_window} to {first_window + len(batch) - 1}"
            " have NaN or infinity; try model.dtype=float32 or bfloat16"
        )
    scalars = _scalars(logits, batch, sums)
    pending = next(scalars, None)
    while pending is not None:
        following = next(scalars, None)
        sums.phase, scalar = pending
        torch.autograd.backward(scalar, retain_graph=following is not None)
        pending = following


def _scalars(logits: Tensor, batch: Tensor, sums: Sums) -> Iterator[tuple[Phase, Tensor]]:
    """Yield the quantities to back-propagate, each with its phase."""
    needs, first = sums.needs, sums.first_window
    once = not sums.only_kronecker
    if needs.kl_metric is not None and once:
        for scalar in cotangents(logits, needs.kl_metric, first):
            yield Phase.KL, scalar
    labels = batch[:, 1:].to(logits.device)
    if needs.fisher_metric is not None and needs.fisher_metric.sampled and once:
        drawn = needs.fisher_metric.draw(logits, first)[:, :-1]
        yield Phase.SAMPLED_LOSS, summed_loss(logits, drawn)
    windows = len(batch) if needs.every_loss else min(len(batch), needs.gradient_windows - first)
    if windows > 0:
        yield Phase.LOSS, summed_loss(logits[:windows], labels[:windows])


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
