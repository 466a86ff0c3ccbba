"""Render the table of an experiment from the runs that are complete; gaps show as gaps.

    python experiments/render.py experiment=main model=tiny dataset=pydoc eval=pydoc

Takes the overrides of the sweep itself; conf/table/<experiment>.yaml specifies the table.
Writes <results>/tables/<experiment>-<model>.md, .csv and .tex, and prints the table.
"""

from __future__ import annotations

from iosvd.errors import exit_in_one_line
from iosvd.runs.tracking import log_sweep
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.tables.frame import to_frame
from iosvd.tables.latex import to_latex
from iosvd.tables.markdown import to_markdown
from iosvd.tables.notes import notes
from iosvd.tables.sweep import read_table


def render(overrides: list[str]) -> None:
    """Write and print one table."""
    read = read_table(overrides)
    sweep, table = read.sweep, read.table
    below = notes(table, read.on_disk, read.spec, sweep)
    folder = made(sweep.results / "tables")
    text = to_markdown(table, below)
    write_text(folder / f"{sweep.name}.md", text)
    write_text(folder / f"{sweep.name}.tex", to_latex(table, below))
    frame = to_frame(table)
    write_text(folder / f"{sweep.name}.csv", frame.to_csv(index=False))
    print(text)
    log_sweep(sweep.name, sweep.runs[0], {"table": frame}, {})


if __name__ == "__main__":
    with exit_in_one_line():
        render(arguments(__doc__))
