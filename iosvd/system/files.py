"""Files that are written whole or not at all, and removed without leaving their folder.

While it is written, a file or folder is called `.<name>.<machine>.<process>.partial`; a rename
gives it its own name. A writer that is killed leaves its partial behind, and whoever writes to
the same folder next removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock
from safetensors import SafetensorError

from iosvd.errors import StorageError

PARTIAL = ".partial"
_BLOCK_BYTES = 2**22
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_OWNER = re.compile(r"\..*\.([0-9a-f]{8})\.([0-9]{1,9})" + re.escape(PARTIAL), flags=re.DOTALL)
_UMASK = os.umask(0)
os.umask(_UMASK)  # Asking for it sets it.
_ABANDONED_SECONDS = 86_400.0  # Of a writer that cannot be asked, on another machine.


def _machine() -> str:
    """Return a code of this machine; containers number their processes apart."""
    numbering = Path("/proc/self/ns/pid")
    apart = numbering.stat().st_ino if numbering.exists() else 0
    return hashlib.sha256(f"{platform.node()} {apart}".encode()).hexdigest()[:8]


_MACHINE = _machine()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a partial to write to, a file or a folder; it is renamed to `path` if nothing fails.

    Raises:
        StorageError: the disk is full, or the folder may not be written to; nothing is left of
            what was written.
    """
    temporary = partial_of(path)
    try:
        with write_failures_explained(path):
            remove(temporary)  # Of a process that had this number before; or a link.
            yield temporary
            _give_usual_modes(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):  # What made the write fail says more.
            remove(temporary)


def _give_usual_modes(path: Path) -> None:
    """Let others read what the umask lets them: safetensors writes for its own user alone."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if not file.is_symlink():
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_UMASK)


def partial_of(path: Path) -> Path:
    """Return what a file or folder is called while this process writes or removes it."""
    # The process in the name: two may write the same table.
    return path.with_name(f".{path.name}.{_MACHINE}.{os.getpid()}{PARTIAL}")


@contextmanager
def write_failures_explained(path: Path) -> Iterator[None]:
    """Raise StorageError instead of what a full disk or a folder of somebody else raises.

    safetensors hides the number of the error in its text.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path) from error
        if error.errno in _DENIED:
            raise StorageError(
                f"cannot write {path}: {error.strerror}; ask its owner for permission, or set"
                " runtime.results and runtime.cache to folders of your own"
            ) from error
        raise
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
    """Remove a file, a folder with everything in it, or a link, but never what a link leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        with suppress(FileNotFoundError):  # Another process is removing it too.
            shutil.rmtree(path)


def made(folder: Path) -> Path:
    """Return a folder that exists now, without what killed writers left in it."""
    with write_failures_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    return folder


def own_folder(parent: Path, *names: str) -> Path:
    """Return a folder below `parent`, made where it is missing; a link in its place is unlinked."""
    for name in names:
        parent = parent / name
        with write_failures_explained(parent):
            if parent.is_symlink():
                parent.unlink(missing_ok=True)
            parent.mkdir(parents=True, exist_ok=True)
    return parent


def process_lock(path: Path, timeout: float = -1) -> FileLock:
    """Return a lock between processes, by a file that colleagues with other accounts can use too.

    The system lets go of it however the process ends. The file stays: unlinked, it would let two
    in at once.
    """
    return FileLock(path, timeout=timeout, mode=0o666)


def remove_partial(folder: Path) -> None:
    """Remove all partials of a folder that no other process writes to now."""
    for path in folder.glob(f".*{PARTIAL}"):
        remove(path)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the partials of writers that have ended, others' too; failing that, leave them.

    Args:
        folder: to look in.
        name: of the file or folder that was to be written; None: any.
    """
    if folder.is_symlink():
        return
    start = "." if name is None else f".{name}."
    with suppress(OSError):  # A folder that is not there, or cannot be read.
        found = [entry.name for entry in os.scandir(folder) if entry.name.startswith(start)]
        for path in (folder / partial for partial in found if partial.endswith(PARTIAL)):
            with suppress(OSError):  # Somebody else's, or removed just now.
                if _abandoned(path):
                    remove(path)


def _abandoned(path: Path) -> bool:
    owner, written = _OWNER.fullmatch(path.name), path.lstat().st_mtime
    if owner is None:
        return False  # Not ours.
    if owner[1] != _MACHINE:
        return time.time() - written > _ABANDONED_SECONDS
    try:  # A number is given again, in a container soon.
        return psutil.Process(int(owner[2])).create_time() > written + 1
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # A process that cannot be asked may be the writer.
        return False
