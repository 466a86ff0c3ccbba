"""A table as Markdown: the best bold, the second underlined, the published value in brackets."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from iosvd.errors import plain
from iosvd.tables.table import Table
from iosvd.tables.text import CellText, cell_text, flags, head_cells, heads


def to_markdown(table: Table, notes: Sequence[str]) -> str:
    """Render a table with its notes below."""
    titles, letters = heads(table), flags(table)
    lines = []
    for row in table.rows:
        letter = letters.get(row.record.commit, "") if row.record is not None else ""
        flag = f"<sup>{letter}</sup>" if letter else ""
        cells = [_cell(cell_text(c, k)) for c, k in zip(row.cells, table.columns, strict=True)]
        head = [escape(text) for text in head_cells(row, titles)]
        lines.append([*head[:-1], head[-1] + flag, *cells])
    body = tabulate(
        lines,
        headers=[*titles, *(column.title for column in table.columns)],
        tablefmt="pipe",
        colalign=["left" if title != "ratio" else "right" for title in titles]
        + ["right"] * len(table.columns),
        disable_numparse=True,
    )
    paragraphs = [f"# {escape(table.title)}", body, *map(escape, notes)]
    return "\n\n".join(paragraphs) + "\n"


def escape(text: str) -> str:
    """Escape text for a Markdown cell, on one line."""
    return plain(text).replace("|", "\\|").replace("<", "&lt;")


def _cell(text: CellText) -> str:
    measured = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}[text.place].format(text.measured)
    if not text.published:
        return measured
    published = f"{text.published}{f'<sup>{text.mark}</sup>' if text.mark else ''}"
    if not measured:
        return published
    return f"{measured} [{published}{f', {text.difference}' if text.difference else ''}]"
