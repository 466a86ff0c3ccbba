"""Write files completely or not at all, and remove them without following links.

While it is written, a file or folder is called `.<name>.<machine>.<process>.partial`; then it is
renamed. A killed writer leaves its partial behind, and the next writer to the same folder removes
it.
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
_POINTER, _LARGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_OWNER = re.compile(r"\..*\.([0-9a-f]{8})\.([0-9]{1,9})" + re.escape(PARTIAL), flags=re.DOTALL)
_UMASK = os.umask(0)
os.umask(_UMASK)  # Reading the umask requires setting it.
_ABANDONED_SECONDS = 86_400.0  # For writers on other machines, which cannot be checked.


def _machine() -> str:
    """Return a code of this machine; each container numbers its own processes."""
    numbering = Path("/proc/self/ns/pid")
    apart = numbering.stat().st_ino if numbering.exists() else 0
    return hashlib.sha256(f"{platform.node()} {apart}".encode()).hexdigest()[:8]


_MACHINE = _machine()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a partial to write to, a file or a folder; it is renamed to `path` if nothing fails.

    Raises:
        StorageError: the disk is full, or the folder may not be written to; nothing is left of
            the partial.
    """
    temporary = partial_of(path)
    try:
        with write_failures_explained(path):
            remove(temporary)  # Left by an earlier process of this number, or a link.
            yield temporary
            _give_usual_modes(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):  # The error of the write is more informative.
            remove(temporary)


def _give_usual_modes(path: Path) -> None:
    """Apply the umask's permissions: safetensors lets only its own user read."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if not file.is_symlink():
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_UMASK)


def partial_of(path: Path) -> Path:
    """Return the name of a file or folder while this process writes or removes it."""
    # With the process's number: two processes may write the same table.
    return path.with_name(f".{path.name}.{_MACHINE}.{os.getpid()}{PARTIAL}")


@contextmanager
def write_failures_explained(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, missing permission or missing locks into StorageError.

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
        if error.errno in _NO_LOCKS:
            raise StorageError(
                f"the disk of {path} has no file locks, which keep two runs from writing the same"
                " file; set runtime.results and runtime.cache to folders on a local disk"
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
    """Write a text file completely or not at all."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def check_no_pointers(place: Path) -> None:
    """Raise StorageError if a file, or one in a folder, is what Git LFS leaves for a large file."""
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        start = b""
        with suppress(OSError):  # Unreadable, which is another error.
            if path.is_file() and path.stat().st_size < _LARGEST_POINTER:
                start = path.read_bytes()
        if start.startswith(_POINTER):
            raise StorageError(
                f"{path} is a pointer of Git LFS, not the file itself; run git lfs pull in its"
                " repository"
            )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    for block in blocks_of(path):
        total.update(block)
    return total.hexdigest()


def blocks_of(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes in blocks."""
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a link, but never the target of a link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        with suppress(FileNotFoundError):  # Another process is removing it too.
            shutil.rmtree(path)


def made(folder: Path) -> Path:
    """Make a folder if needed, remove what killed writers left in it, and return it."""
    with write_failures_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    return folder


def own_folder(parent: Path, *names: str) -> Path:
    """Return a folder below `parent`, made if missing; a link in its place is unlinked."""
    for name in names:
        parent = parent / name
        with write_failures_explained(parent):
            if parent.is_symlink():
                parent.unlink(missing_ok=True)
            parent.mkdir(parents=True, exist_ok=True)
    return parent


def process_lock(path: Path, timeout: float = -1) -> FileLock:
    """Return a lock between processes, on a file that other users can lock too.

    The system releases it however the process ends. The file stays: if it were unlinked, two
    processes could hold the lock at once.
    """
    return FileLock(path, timeout=timeout, mode=0o666)


def remove_partial(folder: Path) -> None:
    """Remove all partials of a folder that no other process writes to now."""
    for path in folder.glob(f".*{PARTIAL}"):
        remove(path)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the partials of writers that have ended, if possible.

    Args:
        folder: to look in.
        name: of the file or folder that was to be written; None: any.
    """
    if folder.is_symlink():
        return
    start = "." if name is None else f".{name}."
    with suppress(OSError):  # The folder does not exist or cannot be read.
        found = [entry.name for entry in os.scandir(folder) if entry.name.startswith(start)]
        for path in (folder / partial for partial in found if partial.endswith(PARTIAL)):
            with suppress(OSError):  # Another user's, or just removed.
                if _abandoned(path):
                    remove(path)


def _abandoned(path: Path) -> bool:
    owner, written = _OWNER.fullmatch(path.name), path.lstat().st_mtime
    if owner is None:
        return False  # Not ours.
    if owner[1] != _MACHINE:
        return time.time() - written > _ABANDONED_SECONDS
    try:  # Process numbers are reused, in containers soon.
        return psutil.Process(int(owner[2])).create_time() > written + 1
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # A process that cannot be checked may be the writer.
        return False
