"""Write one page that compares all complete runs: method × ratio, curves, ranks.

    python experiments/dashboard.py [results]

Writes <results>/dashboard.html, one self-contained page for any browser.
"""

from __future__ import annotations

import logging
from pathlib import Path

from iosvd.errors import RecordError, exit_in_one_line
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.tables.dashboard import read_runs, to_page


def write(results: Path) -> Path:
    """Write the page and return its path.

    Raises:
        RecordError: there is no complete run.
    """
    runs = read_runs(results)
    if not runs:
        raise RecordError(f"{results}/runs holds no complete run; `make demo` makes some")
    path = made(results) / "dashboard.html"
    write_text(path, to_page(runs))
    return path


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    with exit_in_one_line():
        print(write(Path(*arguments(__doc__)[:1] or ["results"])))
