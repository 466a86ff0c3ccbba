"""A table as LaTeX, for the booktabs package."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from iosvd.errors import plain
from iosvd.tables.table import Row, Table
from iosvd.tables.text import CellText, cell_text, flags, head_cells, heads

_SPECIAL = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "–": "--",
    "−": "$-$",
    "σ": r"$\sigma$",
    "Σ": r"$\Sigma$",
    "Δ": r"$\Delta$",
    "×": r"$\times$",
    "|": r"\textbar{}",
}


def to_latex(table: Table, notes: Sequence[str]) -> str:
    """Render a tabular with rules between its groups; the notes are comments below."""
    titles, letters = heads(table), flags(table)
    lines = [
        r"\begin{tabular}{" + "l" * len(titles) + "r" * len(table.columns) + "}",
        r"\toprule",
        _line([escape(title) for title in [*titles, *(c.title for c in table.columns)]]),
        r"\midrule",
    ]
    for row, following in pairwise([*table.rows, None]):
        assert row is not None
        letter = letters.get(row.record.commit, "") if row.record is not None else ""
        cells = [_cell(cell_text(c, k)) for c, k in zip(row.cells, table.columns, strict=True)]
        head = [escape(text) for text in head_cells(row, titles)]
        if letter:
            head[-1] += rf"\textsuperscript{{{letter}}}"
        lines.append(_line([*head, *cells]))
        if following is not None and _group(following) != _group(row):
            lines.append(r"\midrule")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {plain(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Escape text for LaTeX, on one line."""
    return "".join(_SPECIAL.get(character, character) for character in plain(text))


def _group(row: Row) -> tuple[str, float | None]:
    return row.model, row.ratio


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(text: CellText) -> str:
    plain = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}
    measured = plain[text.place].format(escape(text.measured))
    if not text.published:
        return measured
    mark = rf"\textsuperscript{{{text.mark}}}" if text.mark else ""
    published = escape(text.published) + mark
    if not text.measured:
        return published
    difference = f", {escape(text.difference)}" if text.difference else ""
    return f"{measured} [{published}{difference}]"
