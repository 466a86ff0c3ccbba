"""Compare an experiment's results with the published ones, and name the cells that differ too much.

    python experiments/compare.py experiment=main
    python experiments/compare.py reference=FILE.csv experiment=main model=tiny dataset=pydoc …

Takes the overrides of the sweep itself. The reference is the published value for the same model, or
the csv of an earlier rendering; the tolerance is set in conf/table/<experiment>.yaml. The exit
status is 1 if a cell is outside it, 2 if nothing can be compared or the command is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

from iosvd.errors import RecordError, exit_in_one_line
from iosvd.runs.config import own_option
from iosvd.system.commands import arguments
from iosvd.tables.comparison import compare_with_published, compare_with_table, outside
from iosvd.tables.sweep import read_table


def compare(overrides: list[str]) -> bool:
    """Print the cells outside tolerance; return whether there is none."""
    reference, rest = own_option(overrides, "reference")
    read = read_table(rest)
    sweep, tolerance = read.sweep, read.spec.tolerance
    compared = (
        compare_with_published(read.table, tolerance)
        if reference is None
        else compare_with_table(read.table, Path(reference), tolerance)
    )
    if not compared:
        models = ", ".join(dict.fromkeys(run.model.name for run in sweep.runs))
        raise RecordError(
            f"nothing to compare: {len(read.on_disk.records)} of {len(sweep.runs)} runs of {models}"
            " are complete, and none has a reference; run the sweep, or give reference=FILE.csv"
        )
    far = outside(compared)
    for comparison in far:
        print(f"outside tolerance: {comparison}")
    print(f"{sweep.name}: {len(compared) - len(far)} of {len(compared)} cells within tolerance")
    return not far


if __name__ == "__main__":
    with exit_in_one_line():
        sys.exit(0 if compare(arguments(__doc__)) else 1)
