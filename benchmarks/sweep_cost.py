"""The cost of a sweep relative to its unavoidable parts: part of make bench

    python benchmarks/sweep_cost.py experiment=methods model=… dataset=… eval=…

Launches the sweep on an empty folder, and again when it is complete. The reference is the sum of
the statistics, once for each whitening, and of the evaluation of every run, from the records.
Writes <results>/tables/sweep_cost-<experiment>-<model>.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas

from iosvd.errors import exit_in_one_line
from iosvd.runs.records import read_metrics, run_folder
from iosvd.sweeps.expansion import sweep_jobs
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.system.versions import commit
from iosvd.tables.sweep import Sweep

EVALUATION = ("evaluation", "zero_shot", "divergence")
COMMAND = Path(__file__).parents[1] / "experiments" / "compress.py"


def benchmark(overrides: list[str]) -> str:
    """Launch twice, write and return the page."""
    if not any(line.startswith("experiment=") for line in overrides):
        overrides = ["experiment=methods", *overrides]
    named = Sweep.from_overrides(overrides)
    with tempfile.TemporaryDirectory() as folder:
        there = [*overrides, f"runtime.results={folder}"]
        seconds = {name: launch(there) for name in ("first launch", "second launch")}
        records = [read_metrics(run_folder(job.run)) for job in sweep_jobs(there)]
    needed = reference(records)
    rows = [*seconds.items(), *needed.items()]
    whole = sum(needed.values())
    frame = pandas.DataFrame(rows, columns=["", "seconds"])
    page = (
        f"# Cost of a sweep, {named.name}\n\n{frame.to_markdown(index=False, floatfmt='.1f')}\n\n"
        f"First launch / (statistics once for each whitening + evaluation of each run):"
        f" {seconds['first launch'] / whole:.2f}. {len(records)} runs, cold cache;"
        f" {' '.join(overrides)}; commit {commit()}, {time.strftime('%Y-%m-%d')}.\n"
    )
    target = named.results / "tables" / f"sweep_cost-{named.name}.md"
    made(target.parent)
    write_text(target, page)
    return page


def launch(overrides: list[str]) -> float:
    """Return the wall-clock seconds of one launch."""
    started = time.monotonic()
    subprocess.run([sys.executable, str(COMMAND), "-m", *overrides], check=True)
    return time.monotonic() - started


def reference(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of the unavoidable parts and of the other measured ones."""
    statistics: dict[str, float] = {}
    for record in records:  # Of several allocations, the one that needs most.
        whitening = json.dumps(record["config"]["whitening"])
        seconds = record["stages"]["statistics"]["seconds"]
        statistics[whitening] = max(statistics.get(whitening, 0.0), seconds)
    evaluation = sum(_stage(record, name) for record in records for name in EVALUATION)
    return {
        f"statistics, {len(statistics)} whitenings": sum(statistics.values()),
        f"evaluation, {len(records)} runs": evaluation,
    }


def _stage(record: dict[str, Any], name: str) -> float:
    return float(record["stages"].get(name, {"seconds": 0.0})["seconds"])


if __name__ == "__main__":
    with exit_in_one_line():
        print(benchmark(arguments(__doc__)))
