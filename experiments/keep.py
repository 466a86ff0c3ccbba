"""Keep the records of a sweep's complete runs in git, for tables that are measured in parts.

    python experiments/keep.py experiment=methods model=smollm2_135m method=svd_llm,io_svd

Takes the overrides of the sweep itself, or of a part of it. Copies each metrics.json to
<results>/records/<model>/<run>; a run that is measured anew replaces its record.
"""

from __future__ import annotations

from iosvd.errors import exit_in_one_line
from iosvd.runs.fingerprints import digest
from iosvd.runs.records import KEPT, METRICS, read_record, run_folder
from iosvd.system.commands import arguments
from iosvd.system.files import made, remove, write_text
from iosvd.tables.sweep import Sweep


def keep(overrides: list[str]) -> None:
    """Copy the records, and say how many."""
    sweep, copied = Sweep.from_overrides(overrides), 0
    for run in sweep.runs:
        folder = run_folder(run)
        if read_record(folder) is None:
            continue
        kept = sweep.results / KEPT / run.model.name
        for old in kept.glob(f"*-{digest(run)}"):  # It may have had another label.
            remove(old)
        target = made(kept / folder.name)
        write_text(target / METRICS, (folder / METRICS).read_text(encoding="utf-8"))
        copied += 1
    print(f"{copied} of {len(sweep.runs)} records kept in {sweep.results / KEPT}")


if __name__ == "__main__":
    with exit_in_one_line():
        keep(arguments(__doc__))
