"""From the overrides of a sweep to its runs, as Hydra would launch them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from iosvd.errors import ConfigError
from iosvd.options import number
from iosvd.runs.composition import compose, explained
from iosvd.runs.config import (
    CACHE,
    METHOD_GROUPS,
    compose_run,
    config_of,
    group_of,
    label,
    method_options,
    refers_to_ratio,
    run_of,
)
from iosvd.runs.fingerprints import digest
from iosvd.runs.run import Run
from iosvd.runs.validation import check_combination
from iosvd.sweeps.hydra_internals import split_sweep

_GOAL = ("ratio", "target_kl", CACHE, "min_rank_fraction")  # Not of a dense model.
# Rows show these anyway.
_SHOWN_APART = frozenset({"method", "ratio", "model", "model.path", "model.hub_id", "model.name"})


@dataclass(frozen=True)
class Job:
    """A run, and the overrides that compose it, which Hydra's launcher gets."""

    run: Run
    overrides: tuple[str, ...]


def expand(overrides: Sequence[str], sweep: bool) -> list[Run]:
    """Compose and check the run of these overrides, or every run of the sweep they describe.

    A run of a sweep is named after its method and what distinguishes it from the others; what the
    command line fixes for all of them names none.

    Raises:
        ConfigError: one line that names the option and what it may be.
    """
    return [job.run for job in _cells(overrides)] if sweep else [compose_run(overrides)]


def baselines(overrides: Sequence[str]) -> list[Run]:
    """Return the dense runs that the rows of a sweep are to be compared with, one for each model.

    They have one ratio and no method's options, so they cannot be cells of the sweep itself.
    """
    return [job.run for job in _baselines(overrides)]


def sweep_jobs(overrides: Sequence[str]) -> list[Job]:
    """Return the jobs of a sweep, baselines first, each run once.

    Jobs that differ only in the ratio are far apart: in parallel they would wait for each other's
    statistics.

    Raises:
        ConfigError: one line that names the option and what it may be.
    """
    cells = _cells(overrides)
    ratios = list(dict.fromkeys(job.run.goal.ratio for job in cells))
    ordered = [
        *_baselines(overrides),
        *sorted(cells, key=lambda job: ratios.index(job.run.goal.ratio)),
    ]
    return list({digest(job.run): job for job in reversed(ordered)}.values())[::-1]


def _cells(overrides: Sequence[str]) -> list[Job]:
    jobs = _jobs(overrides)
    common = set.intersection(*map(set, jobs))
    fixed = {line for line in common if _key(line) in {_key(given) for given in overrides}}
    return [
        Job(dataclasses.replace(run, label=_label(run, job, common, fixed)), tuple(job))
        for run, job in zip(_composed_once(jobs), jobs, strict=True)
    ]


def _baselines(overrides: Sequence[str]) -> list[Job]:
    dropped = {*METHOD_GROUPS, "method", *_GOAL}
    jobs = [
        (
            *(
                line
                for line in job
                if group_of(line) not in dropped and _key(line) != "calibration.halves"
            ),
            *("method=dense", "ratio=1"),
        )
        for job in _jobs(overrides)
    ]
    found = [Job(compose_run(job), job) for job in dict.fromkeys(jobs)]
    # The calibration does not change the dense model.
    measured = {
        json.dumps([config_of(job.run)["model"], config_of(job.run)["eval"]]): job
        for job in reversed(found)
    }
    return list(reversed(measured.values()))


def _jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Split a sweep into the overrides of its runs, as Hydra's launcher does."""
    experiment = [line for line in overrides if _key(line) == "experiment"]
    # Only an experiment can have sweep parameters; other overrides may hold several values.
    parameters = compose(experiment).hydra.sweeper.params or {}
    lines = [f"{key}={value}" for key, value in parameters.items()] + list(overrides)
    try:
        jobs = split_sweep(lines)
    except HydraException as error:
        raise ConfigError(explained(error, overrides)) from None
    # Options of the launcher are not the runs'.
    return [[line for line in job if not _key(line).startswith("hydra")] for job in jobs]


def _composed_once(jobs: Sequence[Sequence[str]]) -> list[Run]:
    """Compose the runs; those that differ only in the ratio together, if nothing refers to it.

    Hydra takes a tenth of a second per composition, and a table has dozens of runs.
    """
    composed: dict[tuple[str, ...], Run | None] = {}  # None: something refers to the ratio.
    runs = []
    for job in jobs:
        rest = tuple(line for line in job if group_of(line) != "ratio")
        if rest not in composed:
            # With this job's own ratio: the default one might be invalid here.
            found = compose(job)
            composed[rest] = None if refers_to_ratio(found) else run_of(found, job)
        if (run := composed[rest]) is None:
            run = compose_run(job)
        else:
            for line in job:
                if group_of(line) == "ratio":
                    run = _at_ratio(run, line)
        runs.append(run)
    return runs


def _at_ratio(run: Run, override: str) -> Run:
    (parsed,) = OverridesParser.create().parse_overrides([override])
    ratio = number(parsed.value(), "ratio")
    changed = dataclasses.replace(run, goal=dataclasses.replace(run.goal, ratio=ratio))
    check_combination(changed)
    return changed


def _label(run: Run, job: Sequence[str], common: set[str], fixed: set[str]) -> str:
    method = run.label.partition("[")[0]
    changed = [o for o in method_options(job) if o not in fixed or group_of(o) == CACHE]
    other = [x for x in job if x not in common and x not in changed and _key(x) not in _SHOWN_APART]
    return label(method, changed + other)


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]
