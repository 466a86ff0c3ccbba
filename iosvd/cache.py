"""What was computed, in a folder that all processes share: computed once, checked when read.

    <folder>/<kind>/<digest>/header.json        all that the entry depends on, its cost, a checksum
    <folder>/<kind>/<digest>/tensors.safetensors
    <folder>/locks/<digest>.lock                one writer at a time
    <folder>/set_aside/…                        entries that were not what their header says

Tensors are mapped from their file, not read into memory: the system loads the pages that are used
and may drop them again, so the spectra of a whole model need no memory of their own. An entry that
is evicted while another process uses it stays with that process until it ends.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from iosvd.errors import one_line
from iosvd.stages import Stage
from iosvd.storage import (
    PARTIAL,
    DamagedError,
    file_digest,
    read_sealed,
    remove,
    write_sealed,
    written_whole,
)
from iosvd.store import Entry, Key, Store
from iosvd.versions import commit

log = logging.getLogger(__name__)
_commit = functools.cache(commit)  # It asks git.
HEADER, TENSORS = "header.json", "tensors.safetensors"
_LOCKS, _SET_ASIDE = "locks", "set_aside"
_FORGOTTEN_SECONDS = 86_400.0  # Nobody writes for a day.


@dataclass(frozen=True)
class Kept:
    """An entry as it lies in the cache."""

    path: Path
    kind: str
    size_bytes: int
    last_used: float  # Seconds since the epoch.


@dataclass(frozen=True)
class Cache(Store):
    """A folder of entries, of which the least recently used are removed beyond a limit."""

    folder: Path
    limit_bytes: float = float("inf")

    @property
    def keeps(self) -> bool:
        return True

    def get(self, key: Key) -> Entry | None:
        path = self._path(key)
        try:
            header = read_sealed(path / HEADER)
            self._check(path, header, key)
            entry = _mapped(path, header)
        except FileNotFoundError:  # Or evicted just now.
            return None
        except (DamagedError, SafetensorError, KeyError, TypeError) as error:
            self._set_aside(path, error)
            return None
        with suppress(OSError):
            os.utime(path / HEADER)  # Last used.
        return entry

    def put(self, key: Key, entry: Entry) -> Entry:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*{PARTIAL}"):  # Its writer was killed.
            remove(stale)
        header: dict[str, Any] = {
            "kind": key.kind,
            "identity": dict(key.identity),
            "cost": asdict(entry.cost),
            "numbers": dict(entry.numbers),
            "commit": _commit(),
        }
        with written_whole(path) as temporary:
            temporary.mkdir()
            tensors = {n: t.detach().to("cpu").contiguous() for n, t in entry.tensors.items()}
            save_file(tensors, temporary / TENSORS)
            write_sealed(
                temporary / HEADER,
                {**header, "tensors_sha256": file_digest(temporary / TENSORS)},
            )
            remove(path)  # Of a header that was lost.
        # As every later reader has it, also in the place of its bytes: rounding may hang on that.
        with suppress(FileNotFoundError):  # Evicted just now.
            return _mapped(path, header)
        return entry

    @contextmanager
    def locked(self, keys: Iterable[Key]) -> Iterator[None]:
        folder = self.folder / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        names = {key.digest: key.kind for key in keys}
        with ExitStack() as stack:
            for name in sorted(names):  # In one order everywhere, or two could wait for each other.
                lock = FileLock(folder / f"{name}.lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    log.info("waiting for another process, which computes the same %s", names[name])
                    lock.acquire()
                stack.callback(lock.release)
            yield

    def entries(self) -> list[Kept]:
        """Return all entries, those set aside too, the least recently used first."""
        found = []
        for path in self.folder.glob("*/*"):
            if path.name.startswith(".") or not path.is_dir():
                continue
            with suppress(FileNotFoundError):  # Evicted just now.
                files = [file.stat() for file in path.iterdir()]
                last = max((file.st_mtime for file in files), default=0.0)
                size = sum(file.st_size for file in files)
                found.append(Kept(path, path.parent.name, size, last))
        return sorted(found, key=lambda kept: kept.last_used)

    def evict(self, used_before: float = float("inf")) -> list[Kept]:
        """Remove the least recently used entries beyond the limit, and return them.

        Args:
            used_before: seconds since the epoch; what was used later stays.
        """
        entries = self.entries()
        excess = sum(kept.size_bytes for kept in entries) - self.limit_bytes
        removed = []
        for kept in entries:
            if excess <= 0 or kept.last_used >= used_before:
                break
            self.discard(kept)
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

    def discard(self, kept: Kept) -> None:
        """Remove an entry at once for all who look for it."""
        # A process that is killed here leaves no half entry under its name.
        doomed = kept.path.with_name(f".{kept.path.name}.{os.getpid()}{PARTIAL}")
        with suppress(FileNotFoundError):
            kept.path.rename(doomed)
            remove(doomed)

    def _forget_partial(self) -> None:
        for path in self.folder.glob(f"*/.*{PARTIAL}"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS:
                    remove(path)

    def _path(self, key: Key) -> Path:
        return self.folder / key.kind / key.digest

    def _check(self, path: Path, header: dict[str, object], key: Key) -> None:
        if Key(str(header["kind"]), header["identity"]).digest != key.digest:  # type: ignore[arg-type]
            raise DamagedError(f"{path} holds another entry")
        if file_digest(path / TENSORS) != header["tensors_sha256"]:
            raise DamagedError(f"{path / TENSORS} does not match its checksum")

    def _set_aside(self, path: Path, error: Exception) -> None:
        target = self.folder / _SET_ASIDE / f"{path.parent.name}-{path.name}-{time.time_ns()}"
        target.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            path.rename(target)
        log.warning("%s; set aside as %s and computed again", one_line(error), target)


def _mapped(path: Path, header: Mapping[str, Any]) -> Entry:
    return Entry(load_file(path / TENSORS), Stage(**header["cost"]), header["numbers"])
