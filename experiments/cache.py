"""List what the cache keeps, and prune it: make cache

    python experiments/cache.py                    # what it keeps, by kind and model
    python experiments/cache.py keep_gib=50        # and remove the least recently used beyond that
    python experiments/cache.py keep_gib=0         # all of it

Removed entries are computed again when a run needs them. Other options are those of a run, for
instance runtime.results=FOLDER.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pandas

from iosvd.cache.disk import Cache
from iosvd.errors import ConfigError, exit_in_one_line
from iosvd.runs.config import compose_run, own_option
from iosvd.runs.steps import cache_of
from iosvd.system.commands import arguments
from iosvd.system.machine import GIB


def main(overrides: list[str]) -> str:
    """Prune the cache if asked, and return its list."""
    keep, rest = own_option(overrides, "keep_gib")
    cache = cache_of(compose_run(rest))
    cache.check()
    removed = [] if keep is None else replace(cache, limit_bytes=_gib(keep)).evict()
    freed = sum(kept.size_bytes for kept in removed) / GIB
    lines = [listing(cache)]
    if keep is not None:
        lines.append(f"removed: {len(removed)} entries, {freed:.3f} GiB")
    return "\n".join(lines)


def listing(cache: Cache) -> str:
    """Return number, size and last use of the entries, by kind."""
    entries = cache.entries()
    if not entries:
        return f"{cache.folder} keeps nothing"
    frame = pandas.DataFrame(
        [{"kind": e.kind, "GiB": e.size_bytes / GIB, "used": e.last_used} for e in entries]
    )
    by_kind = frame.groupby("kind").agg(
        entries=("GiB", "size"), GiB=("GiB", "sum"), used=("used", "max")
    )
    by_kind["last used"] = by_kind.pop("used").map(
        lambda seconds: time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    )
    total, limit = frame["GiB"].sum(), cache.limit_bytes / GIB
    return (
        f"{by_kind.to_markdown(floatfmt='.3f')}\n\n"
        f"{cache.folder}: {total:.3f} of {limit:g} GiB (runtime.cache_gib)"
    )


def _gib(text: str) -> float:
    try:
        return float(text) * GIB
    except ValueError:
        raise ConfigError(f"keep_gib={text} is no number; for instance keep_gib=50") from None


if __name__ == "__main__":
    with exit_in_one_line():
        print(main(arguments(__doc__)))
