"""Progress bars with the time left; silent unless standard error is a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], total: int, what: str, unit: str) -> Iterator[Item]:
    """Yield the items, with a bar on a terminal's standard error."""
    # disable=None: off when standard error is not a terminal.
    yield from tqdm(items, total=total, desc=what, unit=unit, disable=None, leave=False)


def quiet_libraries() -> None:
    """Turn transformers' bars off unless standard error is a terminal."""
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()


@contextmanager
def bars_for_people() -> Iterator[None]:
    """Keep the bars of libraries, which do not check where they write, out of logs and files."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield
