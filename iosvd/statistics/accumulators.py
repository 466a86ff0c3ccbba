"""Running sums over the calibration set, which the hooks of collect.py add to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial

import torch
from torch import Tensor, nn

from iosvd.errors import ConfigError, ModelError, NumericalError
from iosvd.grams import add_lower_gram_, add_product_, flat, mirror_, wide
from iosvd.statistics.fisher import FisherMetric
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.kronecker import KroneckerSums
from iosvd.statistics.needs import Needs, SiteStatistics
from iosvd.statistics.output_tokens import OutputTokens
from iosvd.windows import Windows


class Phase(Enum):
    """The kinds of signals that reach the hooks."""

    INPUTS = auto()
    KL = auto()
    LOSS = auto()  # Of the true next tokens.
    SAMPLED_LOSS = auto()


@dataclass
class Sums:
    """Sums by site, in float32 or better."""

    needs: Needs
    shared: Mapping[str, str]  # Site to the first site that reads the same tensor.
    seeing: Collection[str] = ()  # Sites that read patches of images, not tokens.
    on_cpu: bool = False  # Rather than on the site's device.
    phase: Phase = Phase.INPUTS
    first_window: int = 0  # Of the batch that passes.
    batch: Windows = field(default_factory=lambda: Windows(torch.zeros(0, 0)))  # That passes.
    only_kronecker: bool = False  # In the passes after the first.
    tokens: int = 0  # That passed.
    inputs: Counter[str] = field(default_factory=Counter)  # Tokens that reached each site.
    input_metric: dict[str, Tensor] = field(default_factory=dict)
    input_magnitude: dict[str, Tensor] = field(default_factory=dict)
    kl_metric: dict[str, Tensor] = field(default_factory=dict)
    fisher_metric: dict[str, Tensor] = field(default_factory=dict)
    fisher_rows: dict[str, Tensor] = field(default_factory=dict)
    fisher_elements: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    kronecker: KroneckerSums = field(default_factory=KroneckerSums)

    def see_output(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        """Add a site's inputs, and watch for the cotangents of its output."""
        x = inputs[0].detach()
        # Blocks run once more on the way back.
        if self.phase is Phase.INPUTS and self.shared[name] == name and not self.only_kronecker:
            rows = self._real(name, flat(x))
            self.inputs[name] += len(rows)
            if self.needs.input_metric:
                self._add_gram(self.input_metric, name, rows)
            if self.needs.input_magnitude:
                self._add(self.input_magnitude, name, rows.abs().sum(0, dtype=wide(x.dtype)))
        if y.requires_grad:  # There is a graph to go back through.
            weighs = self.needs.gradient_windows > 0 or self.needs.every_gradient
            y.register_hook(partial(self.see_cotangent, name, x if weighs else None))

    def _real(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a site's input that do not belong to padding."""
        filled = self.batch.filled
        if filled is None or name in self.seeing or bool(filled.all()):
            return rows
        if len(rows) != filled.numel():
            raise ConfigError(
                f"{name} sees only some tokens of a window, as experts do, and so cannot leave out"
                " padding; calibrate with windows of equal length, or exclude it"
                " (model.sites.exclude)"
            )
        return rows[filled.flatten().to(rows.device)]

    def see_cotangent(self, name: str, x: Tensor | None, cotangent: Tensor) -> None:
        """Add the cotangents of a site's output."""
        kl, fisher = self.needs.kl_metric, self.needs.fisher_metric
        if self.phase is Phase.KL and kl is not None:
            self._add_gram(self.kl_metric, name, self._entering(kl.tokens, name, cotangent))
        elif self.phase is Phase.SAMPLED_LOSS and fisher is not None:
            self._add_gram(self.fisher_metric, name, self._entering(fisher.tokens, name, cotangent))
        elif self.phase is Phase.LOSS:
            if fisher is not None and not fisher.sampled and not self.only_kronecker:
                rows = self._entering(fisher.tokens, name, cotangent)
                self._add_gram(self.fisher_metric, name, rows)
            self._see_loss(name, x, flat(cotangent))

    def _entering(self, tokens: OutputTokens, name: str, cotangent: Tensor) -> Tensor:
        """Return the cotangents that enter an output metric, (tokens, m)."""
        rows = flat(cotangent)
        if not tokens.changes:
            return rows
        if len(rows) != self.batch.tokens.numel():
            raise ConfigError(
                f"{name} sees only some tokens of a window, as experts do, so none can be chosen in"
                " it; set whitening.clip_norms=null whitening.left_out=0"
            )
        return tokens.rows(rows.reshape(*self.batch.tokens.shape, -1))

    def _see_loss(self, name: str, x: Tensor | None, rows: Tensor) -> None:
        if x is None:
            return
        (windows, length), inputs = self.batch.tokens.shape, flat(x)
        whole = len(rows) == windows * length and name not in self.seeing
        scored = max(0, min(windows, self.needs.gradient_windows - self.first_window))
        # The loss of windows that do not count is back-propagated if something else needs it.
        some = self.needs.every_loss and 0 < scored < windows
        if not whole and windows > 1 and (some or self.needs.every_gradient):
            raise ConfigError(
                f"{name} sees only some tokens of a window, so gradients of single windows need"
                f" batches of one window; set runtime.batch_tokens={length}"
            )
        if scored and not self.only_kronecker:
            kept = scored * length if whole else len(rows)
            self._add_product(self.gradient, name, rows[:kept], inputs[:kept])
        if self.needs.every_gradient:
            size = length if whole else len(rows)
            terms = self.batch.predictions.clamp_min(1).tolist()  # Of a window's mean loss.
            parts = zip(rows.split(size), inputs.split(size), terms, strict=True)
            for g, seen, count in parts:
                gradient = g.new_zeros(g.shape[1], seen.shape[1], dtype=wide(g.dtype))
                add_product_(gradient, g, seen)
                self._see_window(name, gradient / count)

    def _see_window(self, name: str, gradient: Tensor) -> None:
        if self.needs.fisher_rows and not self.only_kronecker:
            self._add(self.fisher_rows, name, gradient.square().sum(1))
        if self.needs.fisher_elements and not self.only_kronecker:
            self._add(self.fisher_elements, name, gradient.square())
        if self.needs.kronecker_passes:
            self.kronecker.add(name, gradient)

    def _add(self, sums: dict[str, Tensor], name: str, term: Tensor) -> None:
        sums[name] = (
            sums[name].add_(term.to(sums[name].device)) if name in sums else self._own(term)
        )

    def _add_gram(self, sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
        """Add rowsᵀ rows, computing only the blocks of the lower triangle."""
        width = rows.shape[1]
        if name not in sums:
            sums[name] = self._zeros(rows, (width, width))
        add_lower_gram_(sums[name], rows)

    def _add_product(self, sums: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
        """Add aᵀ b."""
        if name not in sums:
            sums[name] = self._zeros(a, (a.shape[1], b.shape[1]))
        add_product_(sums[name], a, b)

    def _zeros(self, like: Tensor, shape: tuple[int, int]) -> Tensor:
        device = "cpu" if self.on_cpu else None
        return like.new_zeros(shape, dtype=wide(like.dtype), device=device)

    def _own(self, term: Tensor) -> Tensor:
        return term.cpu() if self.on_cpu else term

    def check(self) -> None:
        """Raise for the first site in the model whose sums are not finite."""
        for name in self.shared:
            for what, sums in self._named():
                if name in sums and not torch.isfinite(sums[name]).all():
                    raise NumericalError(
                        f"the {what} of {name} have NaN or infinity on the calibration set;"
                        " try model.dtype=float32 or bfloat16"
                    )

    def check_reached(self, sites: Mapping[str, nn.Module]) -> None:
        """Raise for the first site whose output no gradient has reached, but for idle experts.

        A site that has seen fewer tokens than passed is an expert's.
        """
        needs = self.needs
        asked = ((needs.kl_metric, self.kl_metric), (needs.fisher_metric, self.fisher_metric))
        for name, site in sites.items():
            for wanted, sums in (*asked, (needs.gradient_windows > 0, self.gradient)):
                if not wanted or name in sums:
                    continue
                if self.inputs[self.shared[name]] < self.tokens and name not in self.seeing:
                    m, n = int(site.out_features), int(site.in_features)  # type: ignore[arg-type]
                    shape = (m, n) if sums is self.gradient else (m, m)
                    sums[name] = self._zeros(next(site.parameters()), shape)
                else:
                    raise ModelError(
                        f"no gradient reaches {name}; exclude it (model.sites.exclude)"
                    )

    def _named(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        yield "inputs", self.input_metric
        yield "inputs", self.input_magnitude
        yield "output cotangents", self.kl_metric
        yield "output gradients", self.fisher_metric
        yield "squared gradients", self.fisher_rows
        yield "squared gradients", self.fisher_elements
        yield "gradient", self.gradient
        yield "Kronecker factor", self.kronecker.sums

    def check_windows(self, windows: Windows) -> None:
        """Raise ConfigError if tokens are chosen by their places in windows of unequal length."""
        for metric in (self.needs.kl_metric, self.needs.fisher_metric):
            if metric is not None and metric.tokens.changes and windows.counted is not None:
                raise ConfigError(
                    "clip_norms and left_out choose tokens of whole windows of text, and here only"
                    " some positions count; set whitening.clip_norms=null whitening.left_out=0"
                )

    def finish(self, windows: Windows) -> None:
        """Turn the sums into means in place; sites that share a metric share its memory."""
        kl, fisher = self.needs.kl_metric or KLMetric(), self.needs.fisher_metric or FisherMetric()
        terms = windows.predictions  # By window, whose loss is their mean.
        # Of the tokens that reach the site: fewer than all for an expert. So σ² weighs a component
        # by how often it is used: C and the gradients are means over all tokens.
        for inputs in (self.input_metric, self.input_magnitude):
            for name, total in inputs.items():
                total.div_(self.inputs[name])
        for sums, count in (
            (self.kl_metric, _count(kl.tokens, windows, windows.positions) * kl.estimates),
            (self.fisher_metric, _count(fisher.tokens, windows, terms)),
            (self.fisher_rows, len(windows)),
            (self.fisher_elements, len(windows)),
            (self.gradient, int(terms[: self.needs.gradient_windows].sum())),
        ):
            for total in sums.values():
                total.div_(count)
        symmetric = (self.input_metric, self.kl_metric, self.fisher_metric)
        for total in (total for sums in symmetric for total in sums.values()):
            mirror_(total)

    def statistics(self, name: str) -> SiteStatistics:
        """Return the finished means of a site."""
        leader = self.shared[name]
        return SiteStatistics(
            site=name,
            input_metric=self.input_metric.get(leader),
            input_magnitude=self.input_magnitude.get(leader),
            kl_metric=self.kl_metric.get(name),
            fisher_metric=self.fisher_metric.get(name),
            fisher_rows=self.fisher_rows.get(name),
            fisher_elements=self.fisher_elements.get(name),
            kronecker_left=self.kronecker.left.get(name),
            kronecker_right=self.kronecker.right.get(name),
            gradient=self.gradient.get(name),
        )


def _count(tokens: OutputTokens, windows: Windows, terms: Tensor) -> int:
    """Return how many of the terms of all windows enter an output metric."""
    if tokens.changes:
        return len(windows) * tokens.count(windows.length, int(terms[0]))
    return int(terms.sum())
