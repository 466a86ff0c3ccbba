"""Numbers as text, for every markup."""

from __future__ import annotations

from dataclasses import dataclass

from iosvd.tables.table import Cell, Column, Row, Table

GAP = "–"
MARKS = {"primary": "", "secondary": "s", "derived": "d"}  # Of published values.


@dataclass(frozen=True)
class CellText:
    """The parts of a cell, before markup."""

    measured: str  # The value or a gap; empty in a column of published values.
    place: int
    published: str = ""
    mark: str = ""
    difference: str = ""


def heads(table: Table) -> list[str]:
    """Return the titles of the columns before the numbers; the model only if there are several."""
    models = {row.model for row in table.rows}
    return [*(["model"] if len(models) > 1 else []), "ratio", "method"]


def head_cells(row: Row, titles: list[str]) -> list[str]:
    """Return a row's model, ratio and method, as titled."""
    values = {
        "model": row.model,
        "ratio": GAP if row.ratio is None else f"{row.ratio:g}",
        "method": row.name,
    }
    return [values[title] for title in titles]


def cell_text(cell: Cell, column: Column) -> CellText:
    """Write one cell: the measured value, the published one with its mark, and the difference."""
    measured = GAP if cell.measured is None else number(cell.measured, column.digits)
    if cell.spread is not None and cell.measured is not None:
        measured += f" ± {number(cell.spread, column.digits)}"
    if column.reference:
        measured = ""
    if cell.published is None:
        return CellText(measured or GAP, cell.place)
    difference = ""
    if cell.is_compared:
        assert cell.measured is not None
        change = cell.measured - cell.published.value
        difference = ("−" if change < 0 else "+") + number(abs(change), column.digits)
    published = cell.published
    return CellText(measured, cell.place, published.text, MARKS[published.confidence], difference)


def number(value: float, digits: int) -> str:
    """Format a number; large ones without decimals, which would be meaningless."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.{digits}f}"


def flags(table: Table) -> dict[str, str]:
    """Return a letter for every commit but the one that measured most rows."""
    commits = [row.record.commit for row in table.rows if row.record is not None]
    if not commits:
        return {}
    usual = max(dict.fromkeys(commits), key=commits.count)
    others = dict.fromkeys(commit for commit in commits if commit != usual)
    return {commit: chr(ord("a") + i) for i, commit in enumerate(others)}
