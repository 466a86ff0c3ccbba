"""Collect what the calibration set tells about the sites, in one pass of hooks (METHODS 2).

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
from torch.utils.checkpoint import checkpoint

from iosvd.budget import Shape
from iosvd.errors import ModelError, NumericalError
from iosvd.evaluation.perplexity import summed_loss
from iosvd.kl_metric import cotangents
from iosvd.progress import track
from iosvd.sites import decoder_blocks, in_groups
from iosvd.sums import Phase, Sums
from iosvd.types import Needs, SiteStatistics

if TYPE_CHECKING:  # transformers' models take seconds to import.
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
        sites: target layers by qualified name; linear, or what took a linear layer's place.
        needs: which statistics; none at all costs nothing.
        batch_size: windows per forward pass; it changes results by rounding only.
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


def statistics_bytes(shapes: Mapping[str, Shape], needs: Needs, shared: Mapping[str, str]) -> int:
    """Return the bytes of the sums of these sites, in float32.

    Args:
        shapes: of the sites' weights.
        needs: what is collected.
        shared: what `shared_inputs` returned, of these sites or more.
    """
    entries = 0
    readers: set[str] = set()
    for name, shape in shapes.items():
        m, n = shape.m, shape.n
        if shared[name] not in readers:  # It pays for those that read the same.
            readers.add(shared[name])
            entries += n * n * needs.input_metric + n * needs.input_magnitude
        entries += m * m * ((needs.kl_metric is not None) + (needs.fisher_metric is not None))
        entries += m * needs.fisher_rows + m * n * (needs.gradient_windows > 0)
        # Both factors, and the sum of the one that is being updated.
        entries += (m * m + n * n + max(m, n) ** 2) * (needs.kronecker_passes > 0)
    return 4 * entries


def groups_within(
    shapes: Mapping[str, Shape], needs: Needs, shared: Mapping[str, str], limit_bytes: float
) -> list[list[str]]:
    """Divide sites, in their order, so that the sums of a group are within a limit."""

    def size(group: list[str]) -> int:
        return statistics_bytes({name: shapes[name] for name in group}, needs, shared)

    return in_groups(shapes, size, limit_bytes)


def _pass_over(model: PreTrainedModel, tokens: Tensor, batch_size: int, sums: Sums) -> None:
    starts = range(0, len(tokens), batch_size)
    for start in track(starts, len(starts), "statistics", "batch"):
        _pass(model, tokens[start : start + batch_size], start, sums)
        if start == 0:
            sums.check()  # A broken model fails at once, not after the whole pass.


def _pass(model: PreTrainedModel, batch: Tensor, first_window: int, sums: Sums) -> None:
    """Forward one batch, then back-propagate what is needed; the hooks do the sums."""
    batch = batch.to(model.device)
    sums.phase, sums.first_window, sums.windows = Phase.INPUTS, first_window, len(batch)
    logits = model(input_ids=batch, use_cache=False).logits
    if not torch.isfinite(logits).all():
        sums.check()  # Names the site where it began, if it began in one.
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
    """Yield what is to be back-propagated, with the phase it belongs to."""
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
    """Attach the hooks, with gradients only of activations; put everything back at the end."""
    asked = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(sums.needs.backward))
        model.eval().requires_grad_(False)
        embeddings = model.get_input_embeddings()
        if sums.needs.backward:
            # The leaf that activation gradients start from, since no parameter is one.
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


@contextmanager
def checkpointed(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Keep of each decoder block its input alone, and compute the rest again when it is needed."""
    # Not transformers' own: it works in training mode only, where dropout would be on.
    blocks = decoder_blocks(model) if wanted else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # What stood in front of the method of the class.


def shared_inputs(
    model: PreTrainedModel, tokens: Tensor, sites: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Map each site to the first one that reads the very same tensor (q, k, v; gate, up).

    Args:
        model: a causal language model, on any device, the meta device too.
        tokens: windows (windows, length), of which a few tokens are used.
        sites: target layers by qualified name.

    Raises:
        ModelError: a site is not used; it is named.
    """
    seen: dict[int, tuple[str, Tensor]] = {}  # The tensor is kept so that its id stays its own.
    shared: dict[str, str] = {}

    def see(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shared[name] = seen.setdefault(id(inputs[0]), (name, inputs[0]))[0]

    with ExitStack() as stack, torch.no_grad():
        for name, site in sites.items():
            stack.callback(site.register_forward_pre_hook(partial(see, name)).remove)
        few = tokens[:1, :8].to(model.device)
        # With a mask, transformers looks at no values; meta tensors have none.
        model(input_ids=few, attention_mask=torch.ones_like(few), use_cache=False)
    for name in sites:
        if name not in shared:
            raise ModelError(
                f"{name} is not used in the model's forward pass; exclude it (model.sites.exclude)"
            )
    return {name: shared[name] for name in sites}
