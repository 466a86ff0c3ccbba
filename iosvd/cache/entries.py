"""Recognise the entries of a cache: of a known kind, named by a digest, with our header."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from iosvd.cache.store import KINDS

HEADER, TENSORS, SET_ASIDE = "header.json", "tensors.safetensors", "set_aside"
DIGEST = re.compile(r"[0-9a-f]{32}")
SET_ASIDE_NAME = re.compile(rf"({'|'.join(KINDS)})-[0-9a-f]{{32}}-[0-9]+")


@dataclass(frozen=True)
class Kept:
    """An entry on disk."""

    path: Path
    kind: str
    size_bytes: int
    last_used: float  # Seconds since the epoch.


def folders_in(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the folders in a folder; symbolic links do not count, not even as the folder itself."""
    if folder.is_symlink():
        return
    with suppress(OSError), os.scandir(folder) as found:  # Absent, or owned by another user.
        yield from (entry for entry in found if entry.is_dir(follow_symlinks=False))


def is_entry(path: Path) -> bool:
    """Whether a folder and its two files exist and none of them is a link."""
    if path.parent.is_symlink() or path.is_symlink():
        return False
    try:
        return all(stat.S_ISREG((path / name).lstat().st_mode) for name in (HEADER, TENSORS))
    except OSError:
        return False


def kept_in(path: Path, kind: str) -> Kept | None:
    """Return the entry in a folder, None if the folder is not an entry."""
    if kind == SET_ASIDE:
        if SET_ASIDE_NAME.fullmatch(path.name) is None:
            return None
    elif DIGEST.fullmatch(path.name) is None or not _starts_as_header(path / HEADER, kind):
        return None
    try:
        files = [file.stat(follow_symlinks=False) for file in os.scandir(path)]
    except OSError:  # Just evicted, or owned by another user.
        return None
    last = max((file.st_mtime for file in files), default=0.0)
    return Kept(path, kind, sum(file.st_size for file in files), last)


def _starts_as_header(path: Path, kind: str) -> bool:
    """Whether a file starts like a header of this kind; it is read in full only when needed."""
    start = f'{{\n "kind": "{kind}",'.encode()
    try:
        with path.open("rb") as stream:
            return not path.is_symlink() and stream.read(len(start)) == start
    except OSError:
        return False
