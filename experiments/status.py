"""Report the status of a sweep's runs, with the first line of each failure: make status

    python experiments/status.py experiment=main model=tiny dataset=pydoc eval=pydoc

Takes the overrides of the sweep itself; computes nothing, and works while the sweep is running.
"""

from __future__ import annotations

from collections import Counter

from iosvd.errors import exit_in_one_line, plain
from iosvd.sweeps.expansion import sweep_jobs
from iosvd.sweeps.status import State, status_of
from iosvd.system.commands import arguments


def status(overrides: list[str]) -> str:
    """Return a line for each run that is not done, and the counts."""
    found = [status_of(job.run) for job in sweep_jobs(overrides)]
    lines = [
        f"{one.state.value:<12}{plain(f'{one.run.label} {_goal(one.run.goal.ratio)} {one.reason}')}"
        for one in found
        if one.state is not State.done
    ]
    counts = Counter(one.state for one in found)
    summary = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    return "\n".join([*lines, f"{len(found)} runs: {summary}"])


def _goal(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:g}"


if __name__ == "__main__":
    with exit_in_one_line():
        print(status(arguments(__doc__)))
