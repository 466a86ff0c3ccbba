"""Render records as tables; pure, from values to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas

from iosvd.records import Record
from iosvd.run import Run

GAP = "–"


@dataclass(frozen=True)
class Cell:
    """A run a table expects, and its record if it is complete."""

    run: Run
    record: Record | None


def to_frame(cells: Sequence[Cell]) -> pandas.DataFrame:
    """Return one row per cell, by falling ratio and then in the order given; gaps are NaN."""
    ordered = sorted(cells, key=lambda cell: -cell.run.ratio)
    return pandas.DataFrame([_row(cell) for cell in ordered])


def to_markdown(frame: pandas.DataFrame, title: str, footer: str) -> str:
    """Render a table whose best perplexity per ratio is bold; missing runs show as gaps."""
    best = _best(frame)
    shown = pandas.DataFrame(
        {
            column: [
                f"**{_format(column, value)}**" if best.at[row, column] else _format(column, value)
                for row, value in frame[column].items()
            ]
            for column in map(str, frame)
        }
    )
    align = ["right" if column != "method" else "left" for column in shown]
    table = shown.to_markdown(index=False, colalign=align, disable_numparse=True)
    return f"# {title}\n\n{table}\n\n{footer}\n"


def footer(cells: Sequence[Cell], command: str) -> str:
    """Say how many runs were found, by which code, and how to get the rest."""
    records = [cell.record for cell in cells if cell.record is not None]
    commits = ", ".join(sorted({record.commit for record in records})) or "none"
    lines = [
        "Perplexity per token, less is better, best of each ratio in bold. `ratio` is the"
        " maintenance ratio: parameters kept / parameters of the target layers. Seconds are of the"
        " compression, without loading and evaluation.",
        f"Runs found: {len(records)} of {len(cells)}. Commit: {commits}. Command: `{command}`.",
    ]
    return "\n\n".join(lines)


def _row(cell: Cell) -> dict[str, object]:
    run, record = cell.run, cell.record
    measured = record.perplexity if record is not None else {}
    return {
        "ratio": run.ratio,
        "method": run.label,
        **{_column(run, name): measured.get(name, float("nan")) for name in run.eval.texts},
        "achieved": record.ratio_achieved if record is not None else float("nan"),
        "seconds": record.seconds if record is not None else float("nan"),
    }


def _column(run: Run, text: str) -> str:
    return f"{run.eval.texts[text].name} ppl"


def _best(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Mark the lowest perplexity of each ratio, where there is something to compare."""
    best = pandas.DataFrame(False, index=frame.index, columns=frame.columns)
    for column in (name for name in map(str, frame) if name.endswith(" ppl")):
        for _, values in frame.groupby("ratio")[column]:
            if len(values) > 1 and values.notna().any():
                best.loc[values.idxmin(), column] = True
    return best


def _format(column: str, value: object) -> str:
    if isinstance(value, str):
        return value
    assert isinstance(value, float)
    if value != value:
        return GAP
    digits = {"ratio": 1, "achieved": 4, "seconds": 1}.get(column, 2)
    return f"{value:g}" if column == "ratio" else f"{value:,.{digits}f}"
