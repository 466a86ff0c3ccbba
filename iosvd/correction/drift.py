"""The drift of a site's inputs behind the compressed prefix, and the best weight for them.

Symbols are those of METHODS 7: x_d and x_c are a site's inputs in the dense model and behind the
compressed prefix, R_c = E[x_c x_cᵀ], K = E[x_d x_cᵀ] = R_c + D with D = E[(x_d − x_c) x_cᵀ].
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from iosvd.errors import NumericalError
from iosvd.grams import add_lower_gram_, mirror_, rows_of
from iosvd.linalg import Root, damped


@dataclass(frozen=True)
class Drift:
    """Second moments of the inputs behind the compressed prefix, and of their drift."""

    inputs: Tensor  # R_c, (n, n)
    shift: Tensor  # D, (n, n)
    stream: Tensor | None  # P = E[(s_d − s_c) x_cᵀ], s the residual stream written to, (m, n)
    mean_input: Tensor  # E[x_c], (n,)
    mean_shift: Tensor  # E[x_d − x_c], (n,)
    mean_stream: Tensor | None  # E[s_d − s_c], (m,)
    tokens: int = 1  # Number of tokens of these means.

    def target(self, weight: Tensor) -> Tensor:
        """Return E[(t − W x_c) x_cᵀ], (m, n), of the target t.

        The target is the dense site's output W x_d plus, if the stream was collected, what the
        residual stream lacks.
        """
        lacking = weight @ self.shift
        return lacking if self.stream is None else lacking + self.stream

    def mean_target(self, weight: Tensor) -> Tensor:
        """Return E[t − W x_c], (m,)."""
        lacking = weight @ self.mean_shift
        return lacking if self.mean_stream is None else lacking + self.mean_stream

    def centred(self) -> Drift:
        """Return the central moments, which are left to the weight if a bias takes the means."""
        mean, stream = self.mean_input, self.stream
        if stream is not None and self.mean_stream is not None:
            stream = stream - torch.outer(self.mean_stream, mean)
        return replace(
            self,
            inputs=self.inputs - torch.outer(mean, mean),
            shift=self.shift - torch.outer(self.mean_shift, mean),
            stream=stream,
        )

    def mixed(self, other: Drift) -> Drift:
        """Return the moments of two sets of tokens together."""
        tokens = self.tokens + other.tokens
        mine, theirs = self._tensors(), other._tensors()
        mixed: dict[str, Any] = {
            name: (self.tokens * mine[name] + other.tokens * theirs[name]) / tokens for name in mine
        }
        return replace(self, **mixed, tokens=tokens)

    def to(self, device: torch.device, dtype: torch.dtype) -> Drift:
        """Move the moments to a device and cast them."""
        moved: dict[str, Any] = {n: one.to(device, dtype) for n, one in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def best_weight(weight: Tensor, drift: Drift, trust: float, ridge: float, site: str) -> Tensor:
    """Return the full-rank weight (m, n) with the least error behind the compressed prefix.

    W* = W + trust (W D + P) (R_c + ridge · mean diag(R_c) · I)⁻¹ minimises
    E‖t' − A x_c‖² + ridge · mean diag(R_c) · ‖A − W‖² with the target
    t' = W x_c + trust (t − W x_c) between the site's own output and its target t.
    The output metric cancels at full rank.

    Raises:
        NumericalError: R_c is singular; the site is named.
    """
    metric = damped(drift.inputs, ridge)
    try:
        change = torch.linalg.solve(metric, drift.target(weight).T).T
    except LinAlgError as error:
        raise NumericalError(
            f"the inputs of {site} behind the compressed layers have a singular second moment;"
            " raise correction.ridge"
        ) from error
    return weight + trust * change


def squared_error(change: Tensor, weight: Tensor, drift: Drift, left: Root) -> float:
    """Return E‖L_Cᵀ (t − A x_c)‖² of A = W + change, up to a constant."""
    ours, lacking = left.apply(change), left.apply(drift.target(weight))
    return float((ours @ drift.inputs * ours).sum() - 2 * (lacking * ours).sum())


class DriftSums:
    """Running sums over the calibration set, in float32 or better."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, dense: Tensor, compressed: Tensor, lacking: Tensor | None) -> None:
        """Add a batch of inputs x_d and x_c (…, n), and of s_d − s_c (…, m)."""
        x, shift = rows_of(compressed), rows_of(dense) - rows_of(compressed)
        if not self._sums:
            self._begin(x, lacking)
        sums = self._sums
        add_lower_gram_(sums["inputs"], x)
        sums["shift"].addmm_(shift.T, x)
        sums["mean_input"] += x.sum(0)
        sums["mean_shift"] += shift.sum(0)
        if lacking is not None:
            rows = rows_of(lacking)
            sums["stream"].addmm_(rows.T, x)
            sums["mean_stream"] += rows.sum(0)
        self.tokens += len(x)

    def _begin(self, x: Tensor, lacking: Tensor | None) -> None:
        n, m = x.shape[1], 0 if lacking is None else lacking.shape[-1]
        shapes = {"inputs": (n, n), "shift": (n, n), "mean_input": (n,), "mean_shift": (n,)}
        more = {} if lacking is None else {"stream": (m, n), "mean_stream": (m,)}
        self._sums = {name: x.new_zeros(shape) for name, shape in {**shapes, **more}.items()}

    def means(self) -> Drift:
        """Return the means; the sums are used up."""
        for total in self._sums.values():
            total.div_(self.tokens)
        mirror_(self._sums["inputs"])
        sums = self._sums
        return Drift(
            inputs=sums["inputs"],
            shift=sums["shift"],
            stream=sums.get("stream"),
            mean_input=sums["mean_input"],
            mean_shift=sums["mean_shift"],
            mean_stream=sums.get("mean_stream"),
            tokens=self.tokens,
        )
