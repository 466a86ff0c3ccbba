"""Refuse contradictory options before a model is loaded."""

from __future__ import annotations

from iosvd.budget import check_fraction, check_ratio
from iosvd.errors import ConfigError
from iosvd.factorization import Algorithm, Precision
from iosvd.runs.run import Halves, Run
from iosvd.statistics.needs import ALL_WINDOWS
from iosvd.target import check_target

_NEARLY = 0.95  # Of the dense size, at the break-even rank of a layer of 40 × 40 or more.


def check_combination(run: Run) -> None:
    """Raise ConfigError or BudgetError for options that make no sense together."""
    _check_goal(run)
    _check_floor(run)
    _check_gradient(run)
    _check_trials(run)
    _check_blocks(run)
    f = run.method.factorization
    if f.precision is Precision.float32 and f.algorithm is Algorithm.gram:
        raise ConfigError(
            "factorization.precision=float32 needs factorization.algorithm=svd: a Gram matrix in"
            " float32 loses the smaller half of the spectrum"
        )


def _check_goal(run: Run) -> None:
    run.goal.check_cache(run.method)
    if run.goal.target_kl is None:
        if run.goal.ratio is None:
            raise ConfigError("ratio is not set; set ratio=0.8 or target_kl=0.05")
        check_ratio(run.goal.ratio)
        return
    if run.goal.ratio is not None:
        raise ConfigError(
            f"target_kl chooses the ratio; leave out ratio={run.goal.ratio:g} or target_kl"
        )
    check_target(run.goal.target_kl, run.method.whitening, run.method.quantization)


def _check_floor(run: Run) -> None:
    fraction = run.method.min_rank_fraction
    check_fraction(fraction)
    # At its break-even rank a site costs nearly as much as dense; the exact cost depends on the
    # model.
    if (
        not run.method.quantization.rounds
        and run.goal.ratio is not None
        and _NEARLY * fraction > run.goal.ratio
    ):
        raise ConfigError(
            f"min_rank_fraction={fraction:g} keeps more than ratio={run.goal.ratio:g} allows;"
            " lower it, or raise ratio"
        )


def _check_blocks(run: Run) -> None:
    resources = run.runtime.resources
    if resources.blocks_on_cpu:
        run.method.check_visits()
        if resources.device_map is not None:
            raise ConfigError(
                f"runtime.blocks_on_cpu=true and runtime.device_map={resources.device_map} both say"
                " where blocks are; set one of them"
            )


def _check_trials(run: Run) -> None:
    """Check that there are enough windows for the losses that the allocation measures."""
    if (windows := run.method.allocation.trial_windows) is not None:
        _check_windows("allocation.windows", windows, run)


def _check_gradient(run: Run) -> None:
    asked, calibration = run.method.allocation.needs.gradient_windows, run.data.calibration
    if calibration.windows_each < 1:
        raise ConfigError(f"calibration.halves={calibration.halves.value} needs 2 windows at least")
    if calibration.halves is Halves.other and not asked:
        raise ConfigError(
            "calibration.halves=other scores with windows of its own, but this allocation needs no"
            " gradient; choose allocation=loss_aware or zero_sum, or calibration.halves=same"
        )
    if asked != ALL_WINDOWS:
        _check_windows("allocation.gradient_windows", asked, run)


def _check_windows(option: str, asked: int, run: Run) -> None:
    there = run.data.calibration.windows_each
    if asked > there:
        raise ConfigError(
            f"{option}={asked}, but only {there} windows are there for it; set it to 0 for all,"
            " or raise calibration.windows"
        )
