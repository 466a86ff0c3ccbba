"""Tables are pure: from values to text, with gaps, the best in bold, and a footer that is true."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from iosvd.config import compose_run
from iosvd.records import Record
from iosvd.tables import Cell, footer, to_frame, to_markdown


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    def cell(method: str, ratio: float, perplexity: float | None) -> Cell:
        run = compose_run([f"method={method}", f"ratio={ratio}"])
        if perplexity is None:
            return Cell(run, None)
        return Cell(run, Record(method, ratio, ratio - 1e-4, {"own": perplexity}, 12.34, "abc"))

    return [
        cell("dense", 1.0, 10.0),
        cell("svd", 0.6, 1234.567),
        cell("svd", 0.8, 20.0),
        cell("io_svd", 0.6, 12.0),
        cell("io_svd", 0.8, None),
    ]


def test_rows_are_ordered_by_ratio_and_gaps_are_shown(cells: list[Cell]) -> None:
    frame = to_frame(cells)
    assert list(frame["ratio"]) == [1.0, 0.8, 0.8, 0.6, 0.6]
    assert list(frame["method"]) == ["dense", "svd", "io_svd", "svd", "io_svd"]
    assert frame["pydoc ppl"].tolist()[:2] == [10.0, 20.0]
    assert math.isnan(frame["pydoc ppl"][2])


def test_markdown_is_the_expected_text(cells: list[Cell]) -> None:
    assert to_markdown(to_frame(cells), "demo, tiny", "The footer.") == (
        "# demo, tiny\n"
        "\n"
        "|   ratio | method   |   pydoc ppl |   achieved |   seconds |\n"
        "|--------:|:---------|------------:|-----------:|----------:|\n"
        "|       1 | dense    |       10.00 |     0.9999 |      12.3 |\n"
        "|     0.8 | svd      |   **20.00** |     0.7999 |      12.3 |\n"
        "|     0.8 | io_svd   |           – |          – |         – |\n"
        "|     0.6 | svd      |    1,234.57 |     0.5999 |      12.3 |\n"
        "|     0.6 | io_svd   |   **12.00** |     0.5999 |      12.3 |\n"
        "\n"
        "The footer.\n"
    )


def test_footer_counts_runs_and_names_every_commit(cells: list[Cell]) -> None:
    record = cells[0].record
    assert record is not None
    mixed = [replace(cells[0], record=replace(record, commit="def")), *cells[1:]]
    assert "Runs found: 4 of 5. Commit: abc. Command: `make x`." in footer(cells, "make x")
    assert "Commit: abc, def." in footer(mixed, "make x")
    assert "Commit: none." in footer([cells[-1]], "make x")
