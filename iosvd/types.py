"""The frozen values that flow from statistics to the checkpoint; shapes are (out, in) = (m, n)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iosvd.linalg import Root


@dataclass(frozen=True)
class Whitener:
    """Both roots of a site: `left` of the output metric (m, m), `right` of the input metric (n, n).

    The whitened weight is M = L_Cᵀ W L_R.
    """

    left: Root
    right: Root

    def whiten(self, weight: Tensor) -> Tensor:
        """Return M = L_Cᵀ W L_R, shape (m, n)."""
        return self.right.apply(self.left.apply(weight).T).T


@dataclass(frozen=True)
class Spectrum:
    """A weight as a sum of r components, W = left @ right, in the order of their whitened σ.

    Component i is the i-th singular triple of the whitened weight, taken back to the space of W:
    left[:, i] right[i, :] = σ_i L_C⁻ᵀ u_i v_iᵀ L_R⁻¹.
    """

    left: Tensor  # (m, r)
    right: Tensor  # (r, n)
    sigma: Tensor  # (min(m, n),) descending, complete even where left and right were cut
    left_energy: Tensor  # (r,) squared lengths left[:, i]ᵀ C left[:, i] in the output metric
    right_energy: Tensor  # (r,) squared lengths right[i] R right[i]ᵀ; together they make σ²
    output_diagonal: Tensor  # (m,) of the damped output metric
    input_diagonal: Tensor  # (n,) of the damped input metric
    damping_output: float
    damping_input: float
    loss_change: Tensor | None = None  # (min(m, n),) first-order change when i is dropped: −g_i σ_i
    fisher_norm: float | None = None  # √tr(Fisher of W) / ‖W‖, if the Fisher's rows were collected

    def head(self, rank: int, dtype: torch.dtype) -> Spectrum:
        """Keep all numbers but only the vectors of the first `rank` components, in main memory."""
        # copy: a view would keep the whole matrix in memory.
        left = self.left[:, :rank].to("cpu", dtype, copy=True)
        right = self.right[:rank].to("cpu", dtype, copy=True)
        names = (
            *("sigma", "left_energy", "right_energy", "output_diagonal", "input_diagonal"),
            *(("loss_change",) if self.loss_change is not None else ()),
        )
        numbers: dict[str, Any] = {name: getattr(self, name).cpu() for name in names}
        return replace(self, left=left, right=right, **numbers)


@dataclass(frozen=True)
class Factors:
    """The rank-k result of one site, W_k = left @ right."""

    left: Tensor  # (m, k)
    right: Tensor  # (k, n)
    left_energy: Tensor  # (k,) squared lengths of left's columns in the output metric
    right_energy: Tensor  # (k,) squared lengths of right's rows in the input metric

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """Return W_k, shape (m, n)."""
        return self.left @ self.right


@dataclass(frozen=True)
class Matrix:
    """A matrix to be stored, with the sensitivity of the loss to its entries.

    To second order, errors δ of independent signs cost ½ Σ a_o b_i δ_oi² (METHODS 2.2): a is the
    diagonal of the output metric seen by the matrix, b that of the input metric. For a factor the
    other factor is part of its metric, which is diagonal: the components are orthogonal.
    """

    values: Tensor  # (out, in)
    output_metric: Tensor  # (out,)
    input_metric: Tensor  # (in,)
    gradient: Tensor | None = None  # of the mean calibration loss, (out, in)


@dataclass(frozen=True)
class Site:
    """A site after truncation: two factors, or its weight if it stays dense."""

    name: str
    weight: Tensor  # (m, n), dense
    factors: Factors | None
    output_diagonal: Tensor  # (m,) of the output metric
    input_diagonal: Tensor  # (n,) of the input metric
    gradient: Tensor | None = None  # (m, n), with respect to the truncated weight
    bias: Tensor | None = None  # (m,) of the compressed layer; None: the dense layer's own

    def matrices(self) -> dict[str, Matrix]:
        """Return the site's matrices by their names in its layer."""
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        device = self.weight.device if self.factors is None else self.factors.left.device
        a, b = self.output_diagonal.to(device, kind), self.input_diagonal.to(device, kind)
        g = None if self.gradient is None else self.gradient.to(device, kind)
        if self.factors is None:
            return {"weight": Matrix(self.weight.detach().to(kind), a, b, g)}
        left, right = self.factors.left.to(kind), self.factors.right.to(kind)
        to_left = None if g is None else g @ right.T
        to_right = None if g is None else left.T @ g
        return {
            "weight": Matrix(right, self.factors.left_energy.to(device, kind), b, to_right),
            "left": Matrix(left, a, self.factors.right_energy.to(device, kind), to_left),
        }


class Stored(Protocol):
    """A site as it will be stored."""

    @property
    def bits(self) -> int:
        """Bits stored."""
        ...

    @property
    def rounded(self) -> tuple[int, int]:
        """Number of rows that are not in 16 bits, and of all rows."""
        ...

    @property
    def rounding_loss(self) -> float:
        """Second-order loss of rounding, in the units of ½ Σ σ²."""
        ...

    def module(self, layer: nn.Module) -> nn.Module:
        """Return the layer that holds it, with the bias of the layer it replaces."""
        ...
