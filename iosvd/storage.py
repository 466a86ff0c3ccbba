"""Files that are written whole or not at all, and JSON that knows whether it was changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from iosvd.errors import StorageError

PARTIAL = ".partial"  # What ends so was being written when its writer ended.
_BLOCK_BYTES = 2**22
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SEALED = re.compile(r'(.*),\n "sha256": "([0-9a-f]{64})"\n}\n', flags=re.DOTALL)


class DamagedError(ValueError):
    """A file is not what was written."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a place beside a file or folder to write it to; it is moved there if nothing fails.

    Raises:
        StorageError: the disk is full; nothing is left of what was written.
    """
    # The process in the name: two may write the same table.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with full_disk_explained(path):
            yield temporary
            temporary.replace(path)
    finally:
        remove(temporary)


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Raise StorageError instead of what a full disk raises.

    safetensors hides the number of the error in its text.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(path) from error
    except SafetensorError as error:
        if not any(f"os error {number}" in str(error) for number in _FULL):
            raise
        raise _full(path) from error


def _full(path: Path) -> StorageError:
    return StorageError(
        f"no space left for {path}; free some (make cache lists what is kept), lower"
        " runtime.cache_gib, or set runtime.results to a folder on another disk"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, all of it or nothing."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whose last entry is the checksum of all that stands before it."""
    body = json.dumps(value, indent=1)
    seal = hashlib.sha256(body.encode()).hexdigest()
    write_text(path, body.removesuffix("\n}") + f',\n "sha256": "{seal}"\n}}\n')


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without its checksum.

    Raises:
        DamagedError: a byte of it is not what was written.
        OSError: there is no such file.
    """
    try:
        found = _SEALED.fullmatch(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is not text") from error
    if found is None:
        raise DamagedError(f"{path} has no checksum")
    body = found[1] + "\n}"
    if hashlib.sha256(body.encode()).hexdigest() != found[2]:
        raise DamagedError(f"{path} does not match its checksum")
    return dict(json.loads(body))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    for block in blocks_of(path):
        total.update(block)
    return total.hexdigest()


def blocks_of(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, never all of them at once."""
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def remove(path: Path) -> None:
    """Remove a file, or a folder of files, if it is there."""
    if path.is_dir():
        for inside in path.iterdir():
            inside.unlink(missing_ok=True)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what a writer that was killed left in a folder that nobody else writes to now."""
    for path in folder.glob(f".*{PARTIAL}"):
        remove(path)
