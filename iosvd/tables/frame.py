"""A table as a data frame: unrounded, with the source of every published value."""

from __future__ import annotations

import pandas

from iosvd.tables.table import Row, Table


def to_frame(table: Table) -> pandas.DataFrame:
    """Return the table's rows; each metric has its value and, if any, the published value."""
    return pandas.DataFrame([_row(row, table) for row in table.rows])


def _row(row: Row, table: Table) -> dict[str, object]:
    values: dict[str, object] = {
        "model": row.model,
        "ratio": row.ratio,
        "method": row.name,
        "label": row.label,
    }
    for cell, column in zip(row.cells, table.columns, strict=True):
        if not column.reference:
            values[column.metric.name] = cell.measured
            if cell.spread is not None:
                values[f"{column.metric}_spread"] = cell.spread
        if cell.published is not None:
            published = cell.published
            name = f"{column.metric}_published"
            values |= {
                name: published.text,
                f"{name}_confidence": published.confidence,
                f"{name}_source": f"{published.source}, {published.table}",
            }
    record = row.record
    return values | {
        "ratio_achieved": record.ratio_achieved if record else None,
        "target_bytes": record.target_bytes if record else None,
        "seconds": record.seconds if record else None,
        "commit": record.commit if record else None,
    }
