"""SAES-SVD's coefficient: how far a site's target follows the dense model (METHODS 11.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iosvd.correction.drift import Drift
from iosvd.errors import ConfigError
from iosvd.linalg import damped


@dataclass(frozen=True)
class AdaptiveTrust:
    """The β ∈ [0, largest] whose target loses the least share of itself at the site's rank.

    With H = R_c, Δ = E[(x_d − x_c) x_cᵀ] and L = (H + λI)^(−1/2), the refit truncates
    G(β) = W (H + βΔ) L. Of S = W H L and D = W Δ L the parts outside the leading singular spaces of
    S are lost to first order, so β minimises ‖S⊥ + βD⊥‖² / ‖S + βD‖². The paper (arXiv 2602.03051)
    states none of the constants; these are those of a re-implementation that leaves β as it is.
    """

    largest: float = 1.0
    shrink: float = 1.0  # The chosen β is multiplied by it.

    def __post_init__(self) -> None:
        for name in ("largest", "shrink"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"adaptive.{name}={getattr(self, name):g} is outside [0, 1]")

    def of(self, weight: Tensor, drift: Drift, ridge: float, rank: int) -> float:
        """Return β for a weight (m, n) that is truncated to a rank.

        Args:
            weight: W.
            drift: of the site's inputs.
            ridge: λ, relative to the mean diagonal of H.
            rank: that is kept.
        """
        values, vectors = torch.linalg.eigh(damped(drift.inputs, ridge))
        root = vectors * values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
        s, d = weight @ drift.inputs @ root, weight @ drift.shift @ root
        u, _, vh = torch.linalg.svd(s, full_matrices=False)
        u, vh = u[:, :rank], vh[:rank]
        outside_s, outside_d = _outside(s, u, vh), _outside(d, u, vh)
        lost = _quadratic(outside_s, outside_d)
        whole = _quadratic(s, d)
        return self.shrink * least_share(lost, whole, self.largest)


Quadratic = tuple[float, float, float]  # (a, b, c) of a + 2 b β + c β².


def least_share(lost: Quadratic, whole: Quadratic, largest: float) -> float:
    """Return the β ∈ [0, largest] with the least lost(β) / whole(β)."""
    (a, b, c), (aa, bb, cc) = lost, whole

    def share(beta: float) -> float:
        total = aa + 2 * bb * beta + cc * beta**2
        return (a + 2 * b * beta + c * beta**2) / total if total > 0 else 0.0

    # Where the derivative is zero.
    square, linear, constant = c * bb - b * cc, c * aa - a * cc, b * aa - a * bb
    return min((0.0, largest, *_roots(square, linear, constant, largest)), key=share)


def _roots(square: float, linear: float, constant: float, largest: float) -> list[float]:
    """Return the real roots of a quadratic polynomial in [0, largest]."""
    if square == 0:
        found = [] if linear == 0 else [-constant / linear]
    else:
        inside = linear**2 - 4 * square * constant
        if inside < 0:
            return []
        # Not the textbook's formula, whose difference cancels where `square` is small.
        half = -(linear + (inside**0.5 if linear >= 0 else -(inside**0.5))) / 2
        found = [half / square, *([constant / half] if half != 0 else [])]
    return [beta for beta in found if 0 <= beta <= largest]


def _outside(matrix: Tensor, u: Tensor, vh: Tensor) -> Tensor:
    """Return (1 − U Uᵀ) matrix (1 − V Vᵀ)."""
    matrix = matrix - u @ (u.T @ matrix)
    return matrix - (matrix @ vh.T) @ vh


def _quadratic(first: Tensor, second: Tensor) -> Quadratic:
    """Return ‖first + β second‖² as a polynomial in β."""
    return (
        float(first.square().sum()),
        float((first * second).sum()),
        float(second.square().sum()),
    )
