"""Train one compressed block to return what the dense block returns (METHODS 11.3 and 11.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial

from torch import Tensor

from iosvd.correction.pair import BlockPair
from iosvd.correction.stored_block import BlockUpdate
from iosvd.correction.training import Fit, Optimization, own_parameters_, update_of
from iosvd.correction.work import CorrectionWork, PlannedModel, training_bytes
from iosvd.errors import ConfigError, check_at_least
from iosvd.grams import GRAM_SHARE, wide
from iosvd.linalg import shrunk
from iosvd.models.visiting import device_of
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.needs import Needs
from iosvd.statistics.planning import Work
from iosvd.types import Site


class BlockLoss(Enum):
    """Errors of a block's output: mean squared, or weighted by the KL curvature behind it."""

    squared = "squared"
    kl = "kl"


@dataclass(frozen=True)
class Refinement(Optimization):
    """Block refinement, AA-SVD's (arXiv 2604.02119) unless errors are weighted.

    Twin and dense block read the hidden states in front of each; the error of the twin's output is
    lowered: its mean square, or the KL divergence that it is predicted to cause.
    """

    loss: BlockLoss = BlockLoss.squared
    shrinkage: float = 0.1  # a of (1 − a) C_b + a mean(diag C_b) I, where the loss is the KL's.
    top_k: int = 0  # Of C_b's Hessian; 0: the whole vocabulary.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, top_k=self.top_k)
        if not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"shrinkage={self.shrinkage:g} is outside [0, 1]")

    @property
    def rung(self) -> str:
        return "refinement"

    @property
    def curvature(self) -> KLMetric | None:
        """The KL metric that weighs errors, if one does."""
        return KLMetric(self.top_k) if self.loss is BlockLoss.kl else None

    def work(self, planned: PlannedModel) -> CorrectionWork:
        """Return the work of training every block."""
        shapes, hidden = planned.shapes, planned.shapes.activations.hidden
        # A training step is three forward passes. The metric weighs errors forward and backward.
        weighing = 0 if self.curvature is None else len(shapes.blocks) * hidden**2
        step, loss = 3 * planned.compressed + 2 * weighing, planned.compressed + weighing
        work = CorrectionWork(
            Work(self.multiplications(step, loss), 0),
            training_bytes=training_bytes(
                planned.compressed / len(shapes.blocks), shapes.activations.entry_bytes
            ),
        )
        if self.curvature is None:
            return work
        passes = shapes.statistics(Needs(kl_metric=self.curvature), planned.length).model
        sums = GRAM_SHARE * len(shapes.blocks) * hidden**2
        return work + CorrectionWork(Work(passes, sums))

    def refine_(self, pair: BlockPair, sites: Mapping[str, Site]) -> BlockUpdate:
        """Train the twin of a block; return its sites and other parameters as they are then.

        Args:
            pair: the block.
            sites: as they are installed in the twin, by their names within the block.
        """
        trained = own_parameters_(pair.twin, sites, self)
        metric = pair.curvature
        if metric is not None:
            metric = shrunk(metric, self.shrinkage).to(device_of(pair.twin))
        Fit(
            options=self,
            parameters=list(trained.values()),
            loss=partial(_summed_error, pair, metric),
            # The mean is over the entries of hidden states, or over tokens: nats per token.
            terms=pair.states.token_counts * (pair.states.width if metric is None else 1),
            batch_size=pair.states.batch_size,
            what=f"block {pair.number}, {self.loss.value} error",
            number=pair.number,
        ).run_()
        return update_of(pair.twin, sites, trained)


def _summed_error(pair: BlockPair, metric: Tensor | None, windows: Tensor) -> Tensor:
    """Return the sum of e² over entries, or of ½ eᵀ C e over tokens, of the twin's outputs."""
    device = device_of(pair.twin)
    hidden, target = (kept.states[windows].to(device) for kept in (pair.states, pair.target))
    output = pair.calls[len(windows)](pair.twin, hidden)
    precise = wide(output.dtype)
    error = pair.states.rows(output.to(precise) - target.to(precise), windows)
    if metric is None:
        return error.square().sum()
    return ((error @ metric.to(error.dtype)) * error).sum() / 2
