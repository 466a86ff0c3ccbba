"""Cache entries in a folder shared by all processes: computed once, checked when read.

    <folder>/CACHEDIR.TAG                       marks the folder as ours; backups skip it
    <folder>/<kind>/<digest>/header.json        what the entry depends on, its cost, a checksum
    <folder>/<kind>/<digest>/tensors.safetensors
    <folder>/locks/<digest>.lock                one writer at a time
    <folder>/hashes/<digest>.json               of large files (fingerprints.py)
    <folder>/set_aside/…                        entries that contradicted their header

Nothing else in the folder is counted, renamed or removed, and no link is followed. Listing takes
about 60 µs per entry; a run that wrote any lists them once, at its end.

Tensors are mapped from their file, not read into memory: the system loads the pages that are used
and may drop them again, so the spectra of a whole model need no memory of their own. A process that
uses an entry keeps it until the process ends, even if the entry is evicted.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from iosvd.cache.entries import HEADER, SET_ASIDE, TENSORS, Kept, folders_in, is_entry, kept_in
from iosvd.cache.store import KINDS, Entry, Key, Store
from iosvd.errors import StorageError, one_line
from iosvd.system.files import (
    file_digest,
    own_folder,
    partial_of,
    process_lock,
    remove,
    remove_abandoned,
    write_failures_explained,
    write_text,
    written_whole,
)
from iosvd.system.json_files import DamagedError, read_sealed, typed, write_sealed
from iosvd.system.timing import Stage
from iosvd.system.versions import commit

log = logging.getLogger(__name__)
_commit = functools.cache(commit)  # It asks git.
MARK = "CACHEDIR.TAG"
HASHES, _LOCKS = "hashes", "locks"
_MARK_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"  # https://bford.info/cachedir
    "# The cache of iosvd (runtime.cache). Removing it loses nothing but time.\n"
)


@dataclass(frozen=True)
class _Header:
    """header.json without its own checksum."""

    kind: str
    identity: Mapping[str, Any]
    cost: Stage
    numbers: Mapping[str, float | None]
    tensors_sha256: str


@dataclass(frozen=True)
class Cache(Store):
    """A folder of entries; beyond a size limit, the least recently used are removed."""

    folder: Path
    limit_bytes: float = float("inf")
    _written: list[Key] = field(default_factory=list, compare=False)  # By this object.

    @property
    def keeps(self) -> bool:
        return True

    @property
    def has_written(self) -> bool:
        """Whether anything was written, so that eviction may be needed."""
        return bool(self._written)

    def check(self) -> None:
        """Raise StorageError if the folder holds anything but a cache."""
        if self.folder.exists() and not self._is_marked():
            self._check_empty()

    def get(self, key: Key) -> Entry | None:
        path = self._path(key)
        if not is_entry(path):
            return None
        try:
            header = typed(_Header, read_sealed(path / HEADER), str(path / HEADER))
            self._check(path, header, key)
            entry = Entry(load_file(path / TENSORS), header.cost, header.numbers)
        except FileNotFoundError:  # Or just evicted.
            return None
        except PermissionError as error:
            log.warning("%s belongs to somebody else (%s); computed again", path, error.strerror)
            return None
        except (DamagedError, SafetensorError) as error:
            self._set_aside(path, error)
            return None
        with suppress(OSError):
            os.utime(path / HEADER)  # Last used.
        return entry

    def put(self, key: Key, entry: Entry) -> Entry:
        self.claim()
        own_folder(self.folder, key.kind)
        path, numbers = self._path(key), dict(entry.numbers)
        header: dict[str, Any] = {
            "kind": key.kind,
            "identity": dict(key.identity),
            "cost": asdict(entry.cost),
            "numbers": numbers,
            "commit": _commit(),
        }
        try:
            self._write(path, entry, header)
        except StorageError as error:
            if not (isinstance(error.__cause__, PermissionError) and is_entry(path)):
                raise
            log.warning("%s belongs to somebody else, so this result is not kept", path)
            return entry
        self._written.append(key)
        # Re-read from disk: memory alignment can change rounding, and this process must match
        # later readers.
        with suppress(FileNotFoundError):  # Just evicted.
            return Entry(load_file(path / TENSORS), entry.cost, numbers)
        return entry

    def drop(self, key: Key) -> None:
        if (kept := kept_in(self._path(key), key.kind)) is not None:
            self.discard(kept)

    def _write(self, path: Path, entry: Entry, header: Mapping[str, Any]) -> None:
        with written_whole(path) as temporary:
            temporary.mkdir()
            tensors = {n: t.detach().to("cpu").contiguous() for n, t in entry.tensors.items()}
            save_file(tensors, temporary / TENSORS)
            write_sealed(
                temporary / HEADER,
                {**header, "tensors_sha256": file_digest(temporary / TENSORS)},
            )
            remove(path)  # Of a header that was lost.

    @contextmanager
    def locked(self, keys: Iterable[Key]) -> Iterator[None]:
        self.claim()
        folder = own_folder(self.folder, _LOCKS)
        names = {key.digest: key.kind for key in keys}
        with ExitStack() as stack:
            for name in sorted(names):  # A fixed order avoids deadlocks.
                lock = process_lock(folder / f"{name}.lock")
                with write_failures_explained(folder):
                    try:
                        lock.acquire(timeout=0)
                    except Timeout:
                        log.info(
                            "waiting for another process, which computes the same %s", names[name]
                        )
                        lock.acquire()
                stack.callback(lock.release)
            yield

    def claim(self) -> None:
        """Make the folder, and mark it as a cache.

        Raises:
            StorageError: it holds something else.
        """
        if self._is_marked():
            return
        try:
            with write_failures_explained(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise StorageError(f"{self.folder} is no folder; set runtime.cache") from None
        if self._check_empty():
            write_text(self.folder / MARK, _MARK_TEXT)

    def entries(self) -> list[Kept]:
        """Return all entries, including those set aside, in the order of their eviction.

        Corrected blocks come first, for they serve nothing but a run that was interrupted; then
        the least recently used.
        """
        if not self._is_marked():
            return []
        found = [
            kept
            for kind in (*KINDS, SET_ASIDE)
            for entry in folders_in(self.folder / kind)
            if (kept := kept_in(Path(entry), kind)) is not None
        ]
        return sorted(found, key=lambda kept: (kept.kind != "blocks", kept.last_used))

    def evict(self, used_before: float = float("inf")) -> list[Kept]:
        """Remove the least recently used entries beyond the limit, and return them.

        Args:
            used_before: seconds since the epoch; entries used later stay.
        """
        entries = self.entries()
        excess = sum(kept.size_bytes for kept in entries) - self.limit_bytes
        removed = []
        for kept in entries:
            if excess <= 0:
                break
            if kept.last_used < used_before and self.discard(kept):
                excess -= kept.size_bytes
                removed.append(kept)
        if removed:
            freed = sum(kept.size_bytes for kept in removed) / 2**30
            log.info("cache: %d entries evicted, %.2f GiB", len(removed), freed)
        if excess > 0:
            log.warning(
                "the cache exceeds runtime.cache_gib by %.2f GiB, all of it in use by this run;"
                " raise it so that runs can share what they compute",
                excess / 2**30,
            )
        self._forget_partial()
        return removed

    def discard(self, kept: Kept) -> bool:
        """Remove an entry atomically; return whether that succeeded."""
        # A process killed here leaves no half-removed entry under the entry's name.
        doomed = partial_of(kept.path)
        try:
            remove(doomed)
            kept.path.rename(doomed)
            remove(doomed)
        except FileNotFoundError:
            return False  # Just evicted.
        except OSError as error:
            log.warning("%s cannot be evicted: %s", kept.path, error.strerror)
            return False
        return True

    def _forget_partial(self) -> None:
        if self._is_marked():
            remove_abandoned(self.folder)
            for name in (*KINDS, SET_ASIDE, HASHES):
                remove_abandoned(self.folder / name)

    def _is_marked(self) -> bool:
        try:
            return (self.folder / MARK).read_text(encoding="utf-8") == _MARK_TEXT
        except (OSError, ValueError):
            return False

    def _check_empty(self) -> bool:
        """Return whether the folder is empty; raise if what it holds is not a cache."""
        # Another process may be marking it right now.
        names = sorted(path.name for path in self.folder.iterdir())
        held = [name for name in names if not name.startswith(f".{MARK}.")]
        if not held or self._is_marked():
            return not held
        raise StorageError(
            f"{self.folder} is not a cache of this version: it holds {held[0]} and no mark of ours;"
            " set runtime.cache to a new or an empty folder, or remove what it holds"
        )

    def _path(self, key: Key) -> Path:
        return self.folder / key.kind / key.digest

    def _check(self, path: Path, header: _Header, key: Key) -> None:
        if Key(header.kind, header.identity).digest != key.digest:
            raise DamagedError(f"{path} holds another entry")
        if file_digest(path / TENSORS) != header.tensors_sha256:
            raise DamagedError(f"{path / TENSORS} does not match its checksum")

    def _set_aside(self, path: Path, error: Exception) -> None:
        name = f"{path.parent.name}-{path.name}-{time.time_ns()}"
        target = own_folder(self.folder, SET_ASIDE) / name
        with suppress(OSError):  # Just set aside, or owned by another user.
            path.rename(target)
        log.warning("%s; set aside as %s and computed again", one_line(error), target)
