"""Collect what the calibration set tells about the sites, in one pass of hooks (METHODS 2).

Cost in units of one forward pass: the forward itself 1; each backward pass of the KL metric 1,
because no parameter asks for a gradient; the loss gradient another 1 plus its outer product.
Cotangents are of order one at every position and are divided by the number of tokens at the end,
so half precision does not underflow. Sums are float32 or better, on the device of the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from iosvd.errors import ModelError, NumericalError
from iosvd.kl_metric import cotangents
from iosvd.linalg import add_lower_gram_, mirror_
from iosvd.progress import track
from iosvd.types import Needs, SiteStatistics

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel


def collect(
    model: PreTrainedModel,
    tokens: Tensor,
    sites: Mapping[str, nn.Module],
    needs: Needs,
    batch_size: int = 8,
) -> dict[str, SiteStatistics]:
    """Return the statistics of the given sites, which may be a subset of the model's.

    Args:
        model: a causal language model; its weights and their `requires_grad` are left as they were.
        tokens: calibration windows (windows, length), without padding.
        sites: target layers by qualified name; linear, or what took a linear layer's place.
        needs: which statistics; none at all costs nothing.
        batch_size: windows per forward pass; it changes results by rounding only.

    Raises:
        NumericalError: activations or logits are not finite; the first such site is named.
    """
    if needs == Needs():
        return {name: SiteStatistics(name) for name in sites}
    sums = _Sums(needs, _shared_inputs(model, tokens[:1, :8], sites))
    with _observed(model, sites, sums):
        starts = range(0, len(tokens), batch_size)
        for start in track(starts, len(starts), "statistics", "batch"):
            _pass(model, tokens[start : start + batch_size], start, sums)
            if start == 0:
                sums.check()  # A broken model fails at once, not after the whole pass.
    sums.check()
    sums.finish(*tokens.shape)
    return {name: sums.statistics(name) for name in sites}


def statistics_bytes(sites: Mapping[str, nn.Linear], needs: Needs) -> int:
    """Bound the bytes of the sums from above: shared inputs are counted for every site."""
    total = 0
    for linear in sites.values():
        m, n = linear.weight.shape
        total += n * n * needs.input_metric + n * needs.input_magnitude
        total += m * m * (needs.kl_metric is not None) + m * n * (needs.gradient_windows > 0)
    return 4 * total  # float32


class _Phase(Enum):
    """What arrives at the hooks."""

    INPUTS = auto()
    KL = auto()
    LOSS = auto()


@dataclass
class _Sums:
    """Running sums over the calibration set, keyed by site."""

    needs: Needs
    shared: Mapping[str, str]  # Site to the first site that reads the same tensor.
    phase: _Phase = _Phase.INPUTS
    input_metric: dict[str, Tensor] = field(default_factory=dict)
    input_magnitude: dict[str, Tensor] = field(default_factory=dict)
    kl_metric: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)

    def see_output(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0].detach()
        if self.shared[name] == name:
            rows = _rows(x)
            if self.needs.input_metric:
                _add_gram(self.input_metric, name, rows)
            if self.needs.input_magnitude:
                total = rows.abs().sum(0)
                self.input_magnitude[name] = self.input_magnitude.get(name, 0) + total
        if self.needs.backward:
            kept = x if self.needs.gradient_windows else None
            y.register_hook(partial(self.see_cotangent, name, kept))

    def see_cotangent(self, name: str, x: Tensor | None, cotangent: Tensor) -> None:
        rows = _rows(cotangent)
        if self.phase is _Phase.KL:
            _add_gram(self.kl_metric, name, rows)
        elif x is not None:
            _add_product(self.gradient, name, rows, _rows(x))

    def check(self) -> None:
        """Name the first site, in the order of the model, whose sums are not finite."""
        for name in self.shared:
            for what, sums in (
                ("inputs", self.input_metric),
                ("inputs", self.input_magnitude),
                ("output cotangents", self.kl_metric),
                ("gradient", self.gradient),
            ):
                if name in sums and not torch.isfinite(sums[name]).all():
                    raise NumericalError(
                        f"the {what} of {name} have NaN or infinity on the calibration set;"
                        " try model.dtype=float32 or bfloat16"
                    )

    def finish(self, windows: int, length: int) -> None:
        """Turn the sums into means, in place: sites that share a metric share its memory."""
        estimates = self.needs.kl_metric.estimates if self.needs.kl_metric else 1
        predictions = min(self.needs.gradient_windows, windows) * (length - 1)
        for sums, count in (
            (self.input_metric, windows * length),
            (self.input_magnitude, windows * length),
            (self.kl_metric, windows * length * estimates),
            (self.gradient, predictions),
        ):
            for total in sums.values():
                total.div_(count)
        for total in (*self.input_metric.values(), *self.kl_metric.values()):
            mirror_(total)

    def statistics(self, name: str) -> SiteStatistics:
        leader = self.shared[name]
        return SiteStatistics(
            site=name,
            input_metric=self.input_metric.get(leader),
            input_magnitude=self.input_magnitude.get(leader),
            kl_metric=self.kl_metric.get(name),
            gradient=self.gradient.get(name),
        )


def _pass(model: PreTrainedModel, batch: Tensor, first_window: int, sums: _Sums) -> None:
    """Forward one batch, then back-propagate what is needed; the hooks do the sums."""
    batch = batch.to(model.device)
    sums.phase = _Phase.INPUTS
    logits = model(input_ids=batch, use_cache=False).logits
    if not torch.isfinite(logits).all():
        sums.check()  # Names the site where it began, if it began in one.
        raise NumericalError(
            f"the logits of calibration windows {first_window} to {first_window + len(batch) - 1}"
            " have NaN or infinity; try model.dtype=float32 or bfloat16"
        )
    scalars = _scalars(logits, batch, first_window, sums)
    pending = next(scalars, None)
    while pending is not None:
        following = next(scalars, None)
        sums.phase, scalar = pending
        torch.autograd.backward(scalar, retain_graph=following is not None)
        pending = following


def _scalars(
    logits: Tensor, batch: Tensor, first_window: int, sums: _Sums
) -> Iterator[tuple[_Phase, Tensor]]:
    """Yield what is to be back-propagated, with the phase it belongs to."""
    if sums.needs.kl_metric is not None:
        for scalar in cotangents(logits, sums.needs.kl_metric, first_window):
            yield _Phase.KL, scalar
    windows = min(len(batch), sums.needs.gradient_windows - first_window)
    if windows > 0:
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        predictions = logits[:windows, :-1].flatten(0, 1).to(accumulate)
        labels = batch[:windows, 1:].flatten().to(logits.device)
        yield _Phase.LOSS, cross_entropy(predictions, labels, reduction="sum")


@contextmanager
def _observed(
    model: PreTrainedModel, sites: Mapping[str, nn.Module], sums: _Sums
) -> Iterator[None]:
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


def _shared_inputs(
    model: PreTrainedModel, tokens: Tensor, sites: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Map each site to the first one that reads the very same tensor (q, k, v; gate, up)."""
    seen: dict[int, tuple[str, Tensor]] = {}  # The tensor is kept so that its id stays its own.
    shared: dict[str, str] = {}

    def see(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shared[name] = seen.setdefault(id(inputs[0]), (name, inputs[0]))[0]

    with ExitStack() as stack, torch.no_grad():
        for name, site in sites.items():
            stack.callback(site.register_forward_pre_hook(partial(see, name)).remove)
        model(input_ids=tokens.to(model.device), use_cache=False)
    for name in sites:
        if name not in shared:
            raise ModelError(
                f"{name} is not used in the model's forward pass; exclude it (model.sites.exclude)"
            )
    return {name: shared[name] for name in sites}


def _rows(x: Tensor) -> Tensor:
    """Flatten (windows, length, width) to (tokens, width) in float32 or better."""
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def _add_gram(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Add rowsᵀ rows, of which only the lower triangle's blocks are computed."""
    width = rows.shape[1]
    if name not in sums:
        sums[name] = rows.new_zeros(width, width)
    add_lower_gram_(sums[name], rows)


def _add_product(sums: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
    """Add aᵀ b."""
    if name not in sums:
        sums[name] = a.new_zeros(a.shape[1], b.shape[1])
    sums[name].addmm_(a.T, b)
