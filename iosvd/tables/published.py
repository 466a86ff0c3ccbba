"""The published numbers (results/paper/published.csv), each with its source and confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pandas

from iosvd.errors import RecordError
from iosvd.tables.spec import PublishedTable

PUBLISHED = Path(__file__).parents[2] / "results" / "paper" / "published.csv"


@dataclass(frozen=True)
class Published:
    """One published number: "primary" was read in the paper, "secondary" quoted by others."""

    text: str  # As printed.
    confidence: str
    source: str
    table: str

    @property
    def value(self) -> float:
        return float(self.text)

    @property
    def is_exact(self) -> bool:
        """Whether it is printed with all its digits; some papers print 4e2."""
        return "e" not in self.text


# By source, table, model preset, ratio, the paper's name of the method, and metric.
Library: TypeAlias = Mapping[tuple[str, str, str, float | None, str, str], Published]


def read_published(path: Path = PUBLISHED) -> Library:
    """Read the file.

    Raises:
        RecordError: the file is absent or damaged.
    """
    try:
        frame = pandas.read_csv(path, dtype=str)
        rows = frame.to_dict("records")
        return {
            (
                str(row["source"]),
                str(row["table"]),
                str(row["preset"]),
                float(row["ratio"]),
                str(row["method"]),
                str(row["metric"]),
            ): Published(
                str(row["value"]), str(row["confidence"]), str(row["source"]), str(row["table"])
            )
            for row in rows
        }
    except (OSError, ValueError, KeyError) as error:
        raise RecordError(f"cannot read {path}: {error}; restore it from the repository") from error


def look_up(
    library: Library,
    tables: Sequence[PublishedTable],
    names: Sequence[str],
    model: str,
    ratio: float | None,
    metric: str,
) -> Published | None:
    """Return the number of the first table that has one under the first of the names it knows."""
    for table in tables:
        for name in names:
            key = (table.source, table.table, model, ratio, name, metric)
            if key in library:
                return library[key]
    return None
