"""From a whitened weight to its spectrum, and from a spectrum to rank-k factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from iosvd.budget import Budget
from iosvd.errors import ConfigError, NumericalError
from iosvd.linalg import principal_directions
from iosvd.types import Factors, Spectrum, Whitener


class Precision(Enum):
    """Floating-point type of the factorisation."""

    float32 = "float32"
    float64 = "float64"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self is Precision.float32 else torch.float64


class Algorithm(Enum):
    """gram: eigenvectors of the smaller Gram matrix of M; svd: of M itself, and slower."""

    gram = "gram"
    svd = "svd"


@dataclass(frozen=True)
class Factorization:
    """Computes spectra.

    The Gram route never divides by a singular value: with U from M Mᵀ, W_k = L_C⁻ᵀ U_k U_kᵀ L_Cᵀ W.
    Squaring halves the digits of the small σ, so this route needs float64.
    """

    algorithm: Algorithm = Algorithm.gram
    precision: Precision = Precision.float64

    def __call__(self, weight: Tensor, whitener: Whitener, site: str) -> Spectrum:
        """Return the spectrum of a weight (m, n), in the whitener's metrics.

        Raises:
            NumericalError: the result is not finite; the site is named.
        """
        weight = weight.detach().to(self.precision.dtype)
        factorise = {Algorithm.gram: _by_gram, Algorithm.svd: _by_svd}[self.algorithm]
        found = factorise(weight, whitener)
        if not (torch.isfinite(found.left).all() and torch.isfinite(found.right).all()):
            raise NumericalError(
                f"the factors of {site} are not finite; raise the damping of the whitening"
            )
        return Spectrum(
            **found._asdict(),
            output_diagonal=whitener.left.diagonal(weight[:, 0]),
            input_diagonal=whitener.right.diagonal(weight[0]),
            damping_output=whitener.left.damping,
            damping_input=whitener.right.damping,
        )


class _Components(NamedTuple):
    """The fields of `Spectrum` of the same names."""

    left: Tensor
    right: Tensor
    sigma: Tensor
    left_energy: Tensor
    right_energy: Tensor


def _by_gram(weight: Tensor, whitener: Whitener) -> _Components:
    whitened = whitener.whiten(weight)
    if weight.shape[0] <= weight.shape[1]:
        u, sigma = principal_directions(whitened @ whitened.T)
        right = whitener.left.apply(weight).T.matmul(u).T
        return _Components(whitener.left.unapply(u), right, sigma, torch.ones_like(sigma), sigma**2)
    v, sigma = principal_directions(whitened.T @ whitened)
    left = whitener.right.apply(weight.T).T @ v
    return _Components(left, whitener.right.unapply(v).T, sigma, sigma**2, torch.ones_like(sigma))


def _by_svd(weight: Tensor, whitener: Whitener) -> _Components:
    u, sigma, vh = torch.linalg.svd(whitener.whiten(weight), full_matrices=False)
    right = whitener.right.unapply(vh.T * sigma).T
    return _Components(whitener.left.unapply(u), right, sigma, torch.ones_like(sigma), sigma**2)


def truncate(spectrum: Spectrum, rank: int) -> Factors:
    """Return the best rank-k approximation of a site's weight in its metrics (METHODS 1).

    Each component's weight is divided evenly between its two vectors, so that both factors stay
    within the range of half precision however small the metrics are.

    Raises:
        ConfigError: the spectrum was cut below this rank.
    """
    if rank > spectrum.left.shape[1]:
        raise ConfigError(
            f"rank {rank} is asked of a spectrum that keeps {spectrum.left.shape[1]} components;"
            " factorize with the quantization and cache_tokens that the ranks are planned for"
        )
    left, right = spectrum.left[:, :rank], spectrum.right[:rank]
    norm_left, norm_right = left.norm(dim=0), right.norm(dim=1)
    # A component with one zero vector is zero, whatever the size of the other.
    empty = (norm_left == 0) | (norm_right == 0)
    if bool(empty.any()):
        left, right = left.masked_fill(empty, 0), right.masked_fill(empty[:, None], 0)
    one = torch.ones_like(norm_left)
    scale = torch.where(empty, one, (norm_right / torch.where(empty, one, norm_left)).sqrt())
    return Factors(
        left=left * scale,
        right=right / scale[:, None],
        left_energy=spectrum.left_energy[:rank] * scale**2,
        right_energy=spectrum.right_energy[:rank] / scale**2,
    )


def dropped_energy(
    ranks: Mapping[str, int], spectra: Mapping[str, Spectrum], budget: Budget
) -> float:
    """Return Σ σ² of all components that these ranks drop."""
    return sum(
        float((spectra[site].sigma[rank:] ** 2).sum())
        for site, rank in budget.factorised(ranks).items()
    )
