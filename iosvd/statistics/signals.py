"""The signals that are back-propagated from the logits of a batch, for some positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from iosvd.models.losses import summed_loss
from iosvd.statistics.accumulators import Phase
from iosvd.statistics.kl_metric import cotangents
from iosvd.statistics.needs import Needs
from iosvd.windows import IGNORED, Windows


@dataclass(frozen=True)
class Signals:
    """The signals that the statistics need from the logits of one batch of windows."""

    needs: Needs
    batch: Windows
    first_window: int  # Index of the batch's first window in the calibration set.
    vocabulary: int
    only_losses: bool = False  # In the passes of the Kronecker factors after the first.

    @property
    def phases(self) -> list[Phase]:
        """The backward passes of the batch, in order."""
        needs, found = self.needs, list[Phase]()
        if needs.kl_metric is not None and not self.only_losses:
            found += [Phase.KL] * needs.kl_metric.passes(self.vocabulary)
        if self._samples:
            found.append(Phase.SAMPLED_LOSS)
        if self._scored > 0:
            found.append(Phase.LOSS)
        return found

    def scalars(self, logits: Tensor, start: int) -> Iterator[Tensor]:
        """Yield, for each phase, a scalar whose gradient in the logits is its cotangent.

        Args:
            logits: (windows, positions, vocabulary) of consecutive positions, attached to a graph.
            start: the first of these positions.
        """
        stop = start + logits.shape[1]
        if Phase.KL in self.phases and self.needs.kl_metric is not None:
            yield from cotangents(logits, self.needs.kl_metric, self._signs[:, :, start:stop])
        labels = self.batch.labels[:, start:stop].to(logits.device)
        if self._samples and self.needs.fisher_metric is not None:
            uniform = self._uniform[:, start:stop]
            drawn = self.needs.fisher_metric.draw(logits, uniform)
            yield summed_loss(logits, drawn.masked_fill(labels == IGNORED, IGNORED))
        if self._scored > 0:
            yield summed_loss(logits[: self._scored], labels[: self._scored])

    @property
    def _samples(self) -> bool:
        metric = self.needs.fisher_metric
        return metric is not None and metric.sampled and not self.only_losses

    @property
    def _scored(self) -> int:
        """The number of first windows whose true loss is back-propagated."""
        if self.needs.every_loss:
            return len(self.batch)
        return min(len(self.batch), self.needs.gradient_windows - self.first_window)

    @cached_property
    def _signs(self) -> Tensor:
        """Random signs (passes, windows, length, columns) of the KL metric; 0 does not count."""
        metric, (windows, length) = self.needs.kl_metric, self.batch.tokens.shape
        assert metric is not None
        columns = metric.columns(self.vocabulary)
        signs = torch.stack(
            [metric.signs(self.first_window + i, length, columns) for i in range(windows)], dim=1
        )
        counted = self.batch.counted
        return signs if counted is None else signs * counted.cpu()[..., None]

    @cached_property
    def _uniform(self) -> Tensor:
        """Uniform numbers (windows, length, 1) that draw the labels."""
        metric, (windows, length) = self.needs.fisher_metric, self.batch.tokens.shape
        assert metric is not None
        return torch.stack([metric.uniform(self.first_window + i, length) for i in range(windows)])
