"""Render the table of a sweep from the runs that are complete; gaps show as gaps.

    python experiments/render.py experiment=demo

Takes the overrides of the sweep itself. Writes <results>/tables/<experiment>-<model>.md and .csv,
and prints the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from iosvd.config import baselines, expand
from iosvd.errors import ConfigError, IosvdError
from iosvd.records import read_record, run_folder
from iosvd.run import Run
from iosvd.tables import Cell, footer, to_frame, to_markdown


def render(overrides: list[str]) -> None:
    """Write and print one table."""
    experiment = next((o.split("=")[1] for o in overrides if o.startswith("experiment=")), None)
    if experiment is None:
        raise ConfigError("no experiment given; for instance experiment=demo")
    runs = baselines(overrides) + expand(overrides, True)
    cells = [Cell(run, read_record(run_folder(run))) for run in runs]
    model = runs[0].model.name
    frame = to_frame(cells)
    rest = " ".join(o for o in overrides if not o.startswith("experiment="))
    command = f"make table-{experiment}" + (f' ARGS="{rest}"' if rest else "")
    text = to_markdown(frame, f"{experiment}, {model}", footer(cells, command))
    folder = _tables(runs[0])
    folder.mkdir(parents=True, exist_ok=True)
    # Not with_suffix: a model's name may hold a dot.
    (folder / f"{experiment}-{model}.md").write_text(text, encoding="utf-8")
    frame.to_csv(folder / f"{experiment}-{model}.csv", index=False)
    print(text)


def _tables(run: Run) -> Path:
    return Path(run.runtime.results) / "tables"


if __name__ == "__main__":
    try:
        render(sys.argv[1:])
    except IosvdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
