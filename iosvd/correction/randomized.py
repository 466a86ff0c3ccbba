"""ASVD's randomised SVD at the planned ranks (arXiv 2312.05821, its public code)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.seeding import seeded
from iosvd.errors import check_at_least
from iosvd.system.progress import track
from iosvd.types import Factors, Site, Whitener


@dataclass(frozen=True)
class Randomized(Correction):
    """Take each truncated site's factors from a randomised SVD instead of the exact one.

    The public code sketches the whitened weight with as many random vectors as the rank, without
    oversampling, so that the smaller components are far from the exact ones. Ranks are planned, and
    sensitivities measured, with exact truncations here.
    """

    iterations: int = 2  # Of the power iteration; torch's default.
    seed: int = 233  # The public code's.

    def __post_init__(self) -> None:
        check_at_least(0, iterations=self.iterations)

    @property
    def needs_metrics(self) -> bool:
        return True

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        found: dict[str, Site] = {}
        with seeded(self.seed, inputs.calibration.model.device):
            for name, site in track(inputs.sites.items(), len(inputs.sites), "sketch", "site"):
                found[name] = self._sketched(inputs, site)
        return CorrectionResult(found, inputs.sites.ranks)

    def _sketched(self, inputs: CorrectionInputs, site: Site) -> Site:
        if site.factors is None:
            return site
        dtype = inputs.factorization.precision.dtype
        weight = site.weight.detach().to(dtype)
        statistics = inputs.statistics[site.name].to(weight.device, dtype)
        whitener = inputs.whitening(statistics)
        found = sketch(weight, whitener, site.factors.rank, self.iterations)
        left, right = (factor.to(site.weight.dtype) for factor in (found.left, found.right))
        factors = replace(found, left=left.contiguous(), right=right.contiguous())
        return replace(site, factors=factors, weight=site.weight.detach().to("meta"))


def sketch(weight: Tensor, whitener: Whitener, rank: int, iterations: int) -> Factors:
    """Return the factors of a randomised SVD of L_Cᵀ W L_R, drawn from torch's generator."""
    u, sigma, v = torch.svd_lowrank(whitener.whiten(weight), q=rank, niter=iterations)
    root = sigma.sqrt()
    return Factors(
        left=whitener.left.unapply(u) * root,
        right=(whitener.right.unapply(v) * root).T,
        left_energy=sigma,
        right_energy=sigma,
    )
