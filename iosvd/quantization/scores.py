"""Predict the change of the loss when a row is stored in int8, from its rounding error."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from iosvd.types import Matrix


class Score(Enum):
    """Scores that compare rows.

    signed: the first-order change of the calibration loss ⟨∂L/∂F_row, Q(F_row) − F_row⟩ at the
    truncated weights (IO-SVD+, METHODS 6). absolute: its absolute value; the paper does not say
    which of the two. second_order: the KL that the two metrics predict, without any gradient
    (ours). random: a control.
    """

    absolute = "absolute"
    signed = "signed"
    second_order = "second_order"
    random = "random"

    @property
    def needs_gradient(self) -> bool:
        return self in (Score.absolute, Score.signed)


def row_scores(
    matrix: Matrix, error: Tensor, by_output: bool, score: Score, seed: int = 0
) -> Tensor:
    """Return one score per row: the higher, the worse rounding the row is.

    Args:
        matrix: before rounding, (out, in).
        error: Q(F) − F, (out, in).
        by_output: whether a row holds the weights of one output, or of one input.
        score: the kind of score.
        seed: of the random control.
    """
    if score is Score.second_order:
        return second_order(matrix, error, by_output)
    if score is Score.random:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(error.shape[0 if by_output else 1], generator=generator)
    assert matrix.gradient is not None, "the pipeline collects the gradient that is asked for"
    change = (matrix.gradient * error).sum(1 if by_output else 0)
    return change.abs() if score is Score.absolute else change


def second_order(matrix: Matrix, error: Tensor, by_output: bool) -> Tensor:
    """Return ½ Σ a_o b_i δ_oi² for each row, the expected KL of errors with independent signs."""
    squares = matrix.output_metric[:, None] * error**2 * matrix.input_metric
    return squares.sum(1 if by_output else 0) / 2
