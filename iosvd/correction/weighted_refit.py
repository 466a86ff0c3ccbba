"""WSVD's refit of the factors to the weight, each entry weighted by its Fisher information."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.errors import NumericalError, check_at_least
from iosvd.statistics.needs import Needs
from iosvd.system.progress import track
from iosvd.truncation import collect_in_groups
from iosvd.types import Factors, Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightedRefit(Correction):
    """Lower Σ F_ij (W − A B)²_ij by Adam, from the truncated factors (arXiv 2604.02570).

    F_ij = E_s[G_ij²] over the gradients of calibration windows (METHODS 12). Factors whose error
    does not fall stay as they are truncated. Cost: the statistics of the gradient, and per step
    three products of the weight's size.
    """

    steps: int = 100
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps)
        check_at_least(0, learning_rate=self.learning_rate)

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        own, sites = inputs.calibration, dict[str, Site]()
        found = collect_in_groups(own, Needs(fisher_elements=True), own.shared_inputs)
        for statistics in track(found, len(inputs.sites), "weighted refit", "site"):
            site = inputs.sites[statistics.site]
            if site.factors is not None:
                place = own.device_of(site.name)
                fisher = statistics.need("fisher_elements").to(place)
                factors = self._refitted(site.weight.detach().to(place), site.factors, fisher)
                site = replace(site, factors=factors, weight=site.weight.detach().to("meta"))
            sites[site.name] = site
        return CorrectionResult({name: sites[name] for name in inputs.sites}, inputs.sites.ranks)

    def _refitted(self, weight: Tensor, factors: Factors, fisher: Tensor) -> Factors:
        precise = torch.promote_types(weight.dtype, torch.float32)
        target, weights = weight.to(precise), fisher.to(precise)
        weights = weights / weights.mean().clamp_min(torch.finfo(precise).tiny)
        pair = [
            factor.to(weight.device, precise, copy=True).requires_grad_()
            for factor in (factors.left, factors.right)
        ]

        def loss() -> Tensor:
            return (weights * (target - pair[0] @ pair[1]).square()).mean()

        optimizer = torch.optim.Adam(pair, lr=self.learning_rate)
        with torch.enable_grad():
            start = loss().item()
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            end = loss().item()
        if end != end:
            raise NumericalError(
                "the weighted refit diverges; lower correction.learning_rate or use float32"
            )
        log.debug("weighted error %.4g, refitted %.4g", start, end)
        kept = [factors.left, factors.right] if end >= start else pair
        left, right = (factor.detach().to(weight).contiguous() for factor in kept)
        return replace(factors, left=left, right=right)
