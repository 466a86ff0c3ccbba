"""Scores of a site by the loss: its components' first-order changes, and its sensitivity."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from iosvd.types import Spectrum


def with_loss_change(spectrum: Spectrum, gradient: Tensor) -> Spectrum:
    """Add the first-order change of the loss when component i is dropped, −g_i σ_i (METHODS 1, 4).

    With W = Σ left_i right_i the derivative along component i is left_iᵀ G right_iᵀ, where
    g_i = u_iᵀ L_C⁻¹ G L_R⁻ᵀ v_i has been multiplied by σ_i already.

    Args:
        spectrum: with the vectors of all components.
        gradient: G of the mean calibration loss with respect to W, (m, n).
    """
    along = ((gradient.T @ spectrum.left) * spectrum.right.T).sum(0)
    return replace(spectrum, loss_change=-along)


def with_fisher_norm(spectrum: Spectrum, weight: Tensor, fisher_rows: Tensor) -> Spectrum:
    """Add the sensitivity of a site: the root of its Fisher's trace, relative to its norm.

    Args:
        spectrum: of the site.
        weight: W, (m, n).
        fisher_rows: Σ_j E[(∂ℓ/∂W_ij)²], (m,).
    """
    norm = max(float(weight.detach().norm()), torch.finfo(weight.dtype).tiny)
    return replace(spectrum, fisher_norm=float(fisher_rows.sum().sqrt()) / norm)
