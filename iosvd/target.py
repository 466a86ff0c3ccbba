"""A quality target instead of a ratio: the smallest budget whose predicted KL is within it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from iosvd.allocation import Allocation
from iosvd.allocation.objective import CalibrationObjective
from iosvd.budget import Budget
from iosvd.errors import BudgetError, ConfigError
from iosvd.factorization import dropped_energy
from iosvd.quantization import Quantization
from iosvd.types import Spectrum
from iosvd.whitening import Whitening

log = logging.getLogger(__name__)
STEP = 1e-4  # Of the ratio.


def check_target(target: float, whitening: Whitening, quantization: Quantization) -> None:
    """Raise ConfigError unless a KL target can be predicted and met by ranks alone."""
    if not target > 0:
        raise ConfigError(f"target_kl={target:g} is not above 0; it is in nats per token")
    if not whitening.predicts_whole_kl:
        raise ConfigError(
            "target_kl needs whitening=input_output with whitening.top_k=0, at every role and"
            " without shrinkage: only the curvature of the whole vocabulary predicts the KL"
            " divergence"
        )
    if quantization.rounds:
        raise ConfigError("target_kl needs quantization=none: rounding comes after the ranks")


def budget_for_kl(
    target: float,
    allocation: Allocation,
    spectra: Mapping[str, Spectrum],
    whole: Budget,
    objective: CalibrationObjective,
) -> Budget:
    """Return the budget with the smallest ratio, in steps of 1e-4, predicted to meet the target.

    With the KL metric of the whole vocabulary, ½ Σ σ² of the dropped components predicts the KL
    divergence from the dense model, in nats per token, before anything is truncated (METHODS 1,
    identity 5).

    Args:
        target: nats per token.
        allocation: chooses the ranks.
        spectra: of all sites.
        whole: the budget of ratio 1.
        objective: for allocations that measure.
    """
    low, high = math.ceil(whole.smallest_ratio / STEP), round(1 / STEP)

    def predicted(steps: int) -> float:
        budget = replace(whole, ratio=steps * STEP)
        try:
            ranks = allocation(spectra, budget, objective)
        except BudgetError:  # Of an allocation whose least ranks are above one.
            return math.inf
        return dropped_energy(ranks, spectra, budget) / 2

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if predicted(middle) <= target else (middle + 1, high)
    log.info(
        "ratio %.4f is the smallest that is predicted to stay within %g nats", low * STEP, target
    )
    return replace(whole, ratio=low * STEP)
