"""Command-line arguments and terminal output, handled alike by every command."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

_HOME = re.compile(r"(=|,)([\"']?)~(?=/|,|$|[\"'])")


def arguments(described: str | None) -> list[str]:
    """Return the arguments of this command, with `~` in paths expanded; sys.argv has them too.

    Args:
        described: the docstring of the command, printed for --help; None: it has its own help.
    """
    write_what_can_be_written()
    if described is not None and {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(f"{described.strip()}\n")
        sys.exit(0)
    sys.argv[1:] = [with_home(argument) for argument in sys.argv[1:]]
    return sys.argv[1:]


def with_home(argument: str) -> str:
    """Expand `~` at the beginning of an option's values; shells do so at the beginning of words."""
    return _HOME.sub(lambda match: match[1] + match[2] + str(Path.home()), argument)


def write_what_can_be_written() -> None:
    """Let a terminal that is not UTF-8 show a question mark for what it lacks, not end the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
