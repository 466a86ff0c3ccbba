"""Collect the statistics of sites in one pass over the calibration set (METHODS 2).

Cost in units of one forward pass: the forward itself 1, and once more block by block if there is a
backward pass; each backward pass of the KL metric, or of the loss of drawn labels, 1, because no
parameter asks for a gradient; the true loss another 1, plus the outer product of its gradient. The
Kronecker factors repeat the pass.
Cotangents are of order one at every position and are divided by the number of tokens at the end,
so half precision does not underflow. Sums are float32 or better, on the device of the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.models.chain import without_graph
from iosvd.models.forward import activation_gradients, evaluation
from iosvd.models.sites import reading_tokens, shared_inputs
from iosvd.statistics.accumulators import Phase, Sums
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.statistics.passes import Body, body_of, check_logits, head_gradients
from iosvd.statistics.signals import Signals
from iosvd.system.progress import track
from iosvd.windows import Windows, as_windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


def collect(
    model: PreTrainedModel,
    tokens: Tensor | Windows,
    sites: Mapping[str, nn.Module],
    needs: Needs,
    batch_size: int = 8,
    *,
    on_cpu: bool = False,
) -> dict[str, SiteStatistics]:
    """Return the statistics of the given sites, which may be a subset of the model's.

    Args:
        model: a causal language model; its weights and their `requires_grad` are left as they were.
        tokens: calibration windows (windows, length), or those of images and text.
        sites: target layers by qualified name; linear or compressed.
        needs: which statistics; asking for none costs nothing.
        batch_size: windows per forward pass; it changes results only by rounding.
        on_cpu: keep the sums in main memory, wherever the model is.

    Raises:
        NumericalError: activations or logits are not finite; the first such site is named.
    """
    if needs == Needs():
        return {name: SiteStatistics(name) for name in sites}
    windows = as_windows(tokens)
    reading = reading_tokens(model)
    seeing = {name for name, site in sites.items() if site not in reading}
    sums = Sums(needs, shared_inputs(model, windows, sites), seeing, on_cpu)
    sums.check_windows(windows)
    with activation_gradients(model) if needs.backward else evaluation(model):
        body = body_of(model, windows, sites.values(), backward=needs.backward)
        with _observed(sites, sums):
            for number in range(max(1, needs.kronecker_passes)):
                sums.only_kronecker = number > 0
                _pass_over(body, windows, batch_size, sums)
                sums.kronecker.finish_pass(len(windows), number == needs.kronecker_passes - 1)
    sums.check()
    sums.check_reached(sites)
    sums.finish(windows)
    return {name: sums.statistics(name) for name in sites}


def _pass_over(body: Body, windows: Windows, batch_size: int, sums: Sums) -> None:
    model = body.model
    ends = _ends(len(windows), batch_size, sums.needs.gradient_windows)
    pairs = list(pairwise([0, *ends]))
    for start, end in track(pairs, len(pairs), "statistics", "batch"):
        batch = windows[start:end]
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
        sums.batch = batch
        sums.tokens += 0 if sums.only_kronecker else int(batch.token_counts.sum())
        _pass_batch(body, signals, sums)
        if start == 0:
            sums.check()  # A broken model fails now, not after the whole pass.


def _ends(windows: int, batch_size: int, scored: int) -> list[int]:
    """Return where batches end; those of the loss's gradient are batches of their own."""
    first = min(scored, windows)
    return [
        *range(batch_size, first, batch_size),
        *([first] if first else []),
        *range(first + batch_size, windows, batch_size),
        *([windows] if windows > first else []),
    ]


def _pass_batch(body: Body, signals: Signals, sums: Sums) -> None:
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

    check = partial(_check, signals=signals, sums=sums)
    gradients = head_gradients(body.head, hidden.detach(), signals, check)
    begin(0)  # Blocks run again, but their inputs have been seen.
    chain.back(hidden, gradients, begin)


def _check(logits: Tensor, signals: Signals, sums: Sums) -> None:
    if not torch.isfinite(logits).all():
        sums.check()  # Names the site where it began, if a site did.
        check_logits(logits, signals)


@contextmanager
def _observed(sites: Mapping[str, nn.Module], sums: Sums) -> Iterator[None]:
    """Attach the hooks for a while."""
    with ExitStack() as stack:
        for name, site in sites.items():
            stack.callback(site.register_forward_hook(partial(sums.see_output, name)).remove)
        yield
