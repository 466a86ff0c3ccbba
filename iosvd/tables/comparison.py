"""Compare a table with published numbers, or with an earlier table, cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas

from iosvd.errors import RecordError, one_line, plain
from iosvd.tables.spec import Tolerance
from iosvd.tables.table import Column, Row, Table


@dataclass(frozen=True)
class Comparison:
    """One cell: the measured value, its reference, and whether they are close enough."""

    where: str  # Model, ratio, method and measure.
    measured: float | None  # None: the reference has it, this table does not.
    reference: float
    within: bool

    def __str__(self) -> str:
        if self.measured is None:
            return f"{self.where}: missing, reference {self.reference:g}"
        difference = self.measured - self.reference
        return f"{self.where}: {self.measured:g}, reference {self.reference:g} ({difference:+.3g})"


def compare_with_published(table: Table, tolerance: Tolerance) -> list[Comparison]:
    """Compare every cell that has a published value for the same model, ratio and measure."""
    return [
        _compare(row, column, cell.measured, cell.published.value, tolerance)
        for row in table.rows
        for cell, column in zip(row.cells, table.columns, strict=True)
        if cell.is_compared and cell.measured is not None and cell.published is not None
    ]


def compare_with_table(table: Table, path: Path, tolerance: Tolerance) -> list[Comparison]:
    """Compare with an earlier rendering's csv; its rows are found by model, ratio and label.

    A value that the reference has and this table lacks is outside any tolerance.

    Raises:
        RecordError: the file is absent or not a table's csv.
    """
    try:
        earlier = pandas.read_csv(path)
        keys = zip(earlier["model"], earlier["ratio"], earlier["label"], strict=True)
        rows = dict(zip(keys, earlier.to_dict("records"), strict=True))
        return list(_with_rows(table, rows, tolerance))
    except (OSError, ValueError, KeyError) as error:
        cause = one_line(error)
        raise RecordError(f"cannot read {path}: {cause}; give a rendered table's csv") from None


def _with_rows(table: Table, rows: dict, tolerance: Tolerance) -> Iterator[Comparison]:
    for row in table.rows:
        earlier = rows.get((row.model, row.ratio, row.label), {})
        for cell, column in zip(row.cells, table.columns, strict=True):
            reference = earlier.get(column.metric.name)
            if column.better == 0 or pandas.isna(reference):
                continue
            yield _compare(row, column, cell.measured, float(reference), tolerance)


def _compare(
    row: Row, column: Column, measured: float | None, reference: float, tolerance: Tolerance
) -> Comparison:
    perplexity = column.metric.is_perplexity
    allowed = tolerance.perplexity * reference if perplexity else tolerance.accuracy
    ratio = "unknown" if row.ratio is None else f"{row.ratio:g}"
    where = plain(f"{row.model}, ratio {ratio}, {row.name}, {column.metric}")
    within = measured is not None and abs(measured - reference) <= allowed
    return Comparison(where, measured, reference, within)


def outside(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons outside the tolerance."""
    return [comparison for comparison in comparisons if not comparison.within]
