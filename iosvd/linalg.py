"""Square roots of metrics: one damping policy, three kinds of root, precision chosen by the caller.

A root L of a metric satisfies L Lᵀ = metric + damping. Callers need only two products,
`Lᵀ A` and `L⁻ᵀ A`; products from the right are the transposes of these. The diagonal of the metric
is all that a root still reveals of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from iosvd.errors import NumericalError

LARGEST_DAMPING = 1e-2  # Beyond it the metric would no longer be the measured one.
_FIRST_RETRY = 1e-12  # The first step when zero damping fails.


class RootKind(Enum):
    """Kinds of square roots of a dense metric; results do not depend on it (METHODS 1, 2)."""

    cholesky = "cholesky"
    eigen = "eigen"


class Root(Protocol):
    """A square root L of a metric."""

    @property
    def damping(self) -> float:
        """Relative damping that was needed."""
        ...

    def apply(self, matrix: Tensor) -> Tensor:
        """Return Lᵀ A."""
        ...

    def unapply(self, matrix: Tensor) -> Tensor:
        """Return L⁻ᵀ A."""
        ...

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the diagonal of L Lᵀ, in the shape and type of a vector (n,)."""
        ...


@dataclass(frozen=True)
class IdentityRoot:
    """The metric that treats all channels alike."""

    damping: float = 0.0

    def apply(self, matrix: Tensor) -> Tensor:
        return matrix

    def unapply(self, matrix: Tensor) -> Tensor:
        return matrix

    def diagonal(self, like: Tensor) -> Tensor:
        return torch.ones_like(like)


@dataclass(frozen=True)
class DiagonalRoot:
    """L = diag(scale), scale of shape (n,) and positive."""

    scale: Tensor
    damping: float = 0.0

    def apply(self, matrix: Tensor) -> Tensor:
        return self.scale[:, None] * matrix

    def unapply(self, matrix: Tensor) -> Tensor:
        return matrix / self.scale[:, None]

    def diagonal(self, like: Tensor) -> Tensor:
        return (self.scale**2).to(like)


@dataclass(frozen=True)
class CholeskyRoot:
    """L lower triangular, shape (n, n)."""

    lower: Tensor
    damping: float

    def apply(self, matrix: Tensor) -> Tensor:
        return self.lower.T @ matrix

    def unapply(self, matrix: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower.T, matrix, upper=True)

    def diagonal(self, like: Tensor) -> Tensor:
        return (self.lower**2).sum(1).to(like)


@dataclass(frozen=True)
class EigenRoot:
    """L = Q diag(scale), the root of SVD-LLM V2: vectors Q of shape (n, n), scale of shape (n,)."""

    vectors: Tensor
    scale: Tensor
    damping: float

    def apply(self, matrix: Tensor) -> Tensor:
        return self.scale[:, None] * (self.vectors.T @ matrix)

    def unapply(self, matrix: Tensor) -> Tensor:
        # L⁻ᵀ = Q diag(1/scale), because Q is orthogonal.
        return self.vectors @ (matrix / self.scale[:, None])

    def diagonal(self, like: Tensor) -> Tensor:
        return (self.vectors**2 @ self.scale**2).to(like)


def root_of(metric: Tensor, damping: float, kind: RootKind, what: str) -> Root:
    """Take the square root of a symmetric positive semidefinite metric of shape (n, n).

    `damping` is relative to the mean of the diagonal (METHODS 2.6). If the factorisation fails it
    is raised by powers of ten up to `LARGEST_DAMPING`; the root records the value used.

    Raises:
        NumericalError: the metric is zero, not finite, or cannot be factorised; `what` names it.
    """
    _check(metric, what)
    attempt = {RootKind.cholesky: _cholesky, RootKind.eigen: _eigen}[kind]
    for relative in _dampings(damping):
        root = attempt(damped(metric, relative), relative)
        if root is not None:
            return root
    raise NumericalError(
        f"{what} has no {kind.value} root even with damping {LARGEST_DAMPING:g};"
        " use more calibration tokens"
    )


def singular_root(matrix: Tensor, damping: float, what: str) -> Root:
    """Return U√D of the SVD of a square matrix that need not be symmetric: a root of U D Uᵀ.

    `damping` is what the matrix has been damped with; it is raised if the matrix is singular.

    Raises:
        NumericalError: the matrix is zero, not finite, or singular; `what` names it.
    """
    _check(matrix, what)
    for extra in (0.0, *_dampings(max(10 * damping, _FIRST_RETRY))):
        vectors, values, _ = torch.linalg.svd(damped(matrix, extra))
        if values[-1] > 0:
            return EigenRoot(vectors, values.sqrt(), damping + extra)
    raise NumericalError(f"{what} is singular even with damping {LARGEST_DAMPING:g}")


def damped(metric: Tensor, relative: float) -> Tensor:
    """Return metric + damping, relative to the mean of its diagonal (METHODS 2.6)."""
    return raised(metric, relative * metric.diagonal().mean())


def shrunk(metric: Tensor, share: float) -> Tensor:
    """Return (1 − a) metric + a mean(diag metric) I for a share a (METHODS 11.1)."""
    if share == 0:
        return metric
    return raised((1 - share) * metric, share * metric.diagonal().mean())


def raised(metric: Tensor, amount: Tensor | float) -> Tensor:
    """Return metric + amount · I."""
    return metric + amount * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)


def _check(metric: Tensor, what: str) -> None:
    if not torch.isfinite(metric).all():
        raise NumericalError(f"{what} is not finite; check the model's dtype and the calibration")
    if metric.diagonal().mean() <= 0:
        raise NumericalError(
            f"{what} is zero: no calibration token reaches the site, or a weight of zeros in front"
            " of it or behind it cuts it off; exclude it (model.sites.exclude)"
        )


def _dampings(first: float) -> Iterator[float]:
    yield first
    relative = max(10 * first, _FIRST_RETRY)
    while relative <= LARGEST_DAMPING * 1.001:
        yield relative
        relative *= 10


def _cholesky(matrix: Tensor, damping: float) -> Root | None:
    lower, info = torch.linalg.cholesky_ex(matrix)
    return None if info.item() else CholeskyRoot(lower, damping)


def _eigen(matrix: Tensor, damping: float) -> Root | None:
    values, vectors = torch.linalg.eigh(matrix)
    return EigenRoot(vectors, values.sqrt(), damping) if values[0] > 0 else None


def principal_directions(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions (n, n) and σ (n,) descending, of a matrix A with Gram A Aᵀ (n, n)."""
    values, vectors = torch.linalg.eigh(gram)
    # Rounding leaves the smallest eigenvalues slightly below zero.
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()
