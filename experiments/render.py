"""Render the table of an experiment from the runs that are complete; gaps show as gaps.

    python experiments/render.py experiment=main model=tiny dataset=pydoc eval=pydoc

Takes the overrides of the sweep itself, and what the table shows from conf/table/<experiment>.yaml.
Writes <results>/tables/<experiment>-<model>.md, .csv and .tex, and prints the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from iosvd.errors import exit_in_one_line
from iosvd.tables.frame import to_frame
from iosvd.tables.latex import to_latex
from iosvd.tables.markdown import to_markdown
from iosvd.tables.notes import notes
from iosvd.tables.sweep import read_table
from iosvd.tracking import log_sweep


def render(overrides: list[str]) -> None:
    """Write and print one table."""
    read = read_table(overrides)
    sweep, table = read.sweep, read.table
    below = notes(table, read.on_disk, read.spec, sweep)
    folder = sweep.results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    text = to_markdown(table, below)
    _write(folder / f"{sweep.name}.md", text)
    _write(folder / f"{sweep.name}.tex", to_latex(table, below))
    frame = to_frame(table)
    frame.to_csv(folder / f"{sweep.name}.csv", index=False)
    print(text)
    log_sweep(sweep.name, sweep.runs[0], {"table": frame}, {})


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with exit_in_one_line():
        render(sys.argv[1:])
