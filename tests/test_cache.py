"""The cache returns what was put, notices damage, evicts the oldest, and lets one process write."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hostile import tree
from torch import Tensor

from experiments import cache as command
from iosvd.cache.disk import MARK, Cache
from iosvd.cache.store import Entry, Key
from iosvd.errors import StorageError
from iosvd.system.files import partial_of
from iosvd.system.timing import Stage

COST = Stage(1.5, 2**20)


def key(name: str = "a") -> Key:
    return Key("statistics", {"model": "m", "options": {"top_k": 5, "roles": ["*"]}, "site": name})


def tensors(size: int = 64) -> dict[str, Tensor]:
    return {"x": torch.arange(size, dtype=torch.float32), "y": torch.eye(3, dtype=torch.float64)}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_an_entry_is_what_was_put(cache: Cache) -> None:
    assert cache.get(key()) is None
    put = cache.put(key(), Entry(tensors(), COST, {"damping": 1e-6, "none": None}))
    got = cache.get(key())
    assert got is not None
    for entry in (put, got):
        assert entry.cost == COST
        assert entry.numbers == {"damping": 1e-6, "none": None}
        for name, tensor in tensors().items():
            assert torch.equal(entry.tensors[name], tensor)
    assert cache.get(key("b")) is None
    assert not list(cache.folder.rglob("*.partial"))


def test_the_header_says_all_that_the_key_depends_on(cache: Cache) -> None:
    cache.put(key(), Entry(tensors(), COST))
    (path,) = cache.folder.glob("*/*/header.json")
    header = json.loads(path.read_text())
    assert header["identity"] == dict(key().identity)
    assert header["kind"] == path.parts[-3] == "statistics"
    assert {"commit", "tensors_sha256", "sha256", "cost"} <= set(header)


@pytest.mark.parametrize("name", ["header.json", "tensors.safetensors"])
def test_a_flipped_bit_is_noticed_and_the_entry_set_aside(
    name: str, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    chooser = random.Random(0)
    for number in range(40):
        cache.put(key(), Entry(tensors(), COST))
        (path,) = cache.folder.glob(f"statistics/*/{name}")
        content = bytearray(path.read_bytes())
        content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert cache.get(key()) is None
        assert "set aside" in caplog.text
        assert len(list((cache.folder / "set_aside").iterdir())) == number + 1
    assert cache.get(key()) is None  # And is not looked for again.


def test_a_foreign_entry_is_set_aside(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    cache.put(key("a"), Entry(tensors(), COST))
    (folder,) = cache.folder.glob("statistics/*")
    folder.rename(folder.with_name(key("b").digest))
    with caplog.at_level(logging.WARNING):
        assert cache.get(key("b")) is None
    assert "holds another entry" in caplog.text


def test_the_least_recently_used_go_first(cache: Cache) -> None:
    for place, name in enumerate("abc"):
        cache.put(key(name), Entry(tensors(1000), COST))
        (header,) = cache.folder.glob(f"statistics/{key(name).digest}/header.json")
        long_ago = time.time() - 1000 + place
        for file in header.parent.iterdir():
            os.utime(file, (long_ago, long_ago))
    cache.get(key("a"))  # Now b is the oldest.
    size = sum(kept.size_bytes for kept in cache.entries())
    removed = Cache(cache.folder, size - 1).evict()
    assert [kept.path.name for kept in removed] == [key("b").digest]
    assert cache.get(key("b")) is None
    assert cache.get(key("a")) is not None and cache.get(key("c")) is not None


def test_what_is_in_use_is_not_evicted(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    started = time.time() - 1
    cache.put(key(), Entry(tensors(), COST))
    with caplog.at_level(logging.WARNING):
        assert Cache(cache.folder, 10).evict(used_before=started) == []
    assert "exceeds runtime.cache_gib" in caplog.text
    assert cache.get(key()) is not None


def test_an_entry_that_is_evicted_stays_with_who_uses_it(cache: Cache) -> None:
    entry = cache.put(key(), Entry(tensors(100_000), COST))
    Cache(cache.folder, 0).evict()
    assert cache.get(key()) is None
    assert torch.equal(entry.tensors["x"], tensors(100_000)["x"])


def test_what_a_killed_writer_left_is_removed_and_what_another_writes_is_not(cache: Cache) -> None:
    cache.claim()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours, theirs = (
        partial_of(cache.folder / "statistics" / key(name).digest) for name in ("a", "b")
    )
    dead = ours.with_name(ours.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    for half in (dead, theirs):
        half.mkdir(parents=True)
        (half / "tensors.safetensors").write_bytes(b"half")
    assert cache.get(key()) is None
    assert cache.entries() == []
    cache.put(key(), Entry(tensors(), COST))
    cache.evict()
    assert not dead.exists() and theirs.exists()


WRITER = """
import sys, time, torch
from pathlib import Path
from iosvd.cache.disk import Cache
from iosvd.system.timing import Stage
from iosvd.cache.store import Entry, Key
cache, key = Cache(Path(sys.argv[1])), Key("statistics", {"n": 1})
for _ in range(20):
    with cache.locked([key, Key("statistics", {"n": 0})]):
        found = cache.get(key)
        count = 0 if found is None else int(found.tensors["count"])
        if found is not None:
            cache.discard(cache.entries()[0])
        cache.put(key, Entry({"count": torch.tensor(count + 1)}, Stage(0.0, 0)))
"""


def test_one_process_writes_at_a_time(cache: Cache) -> None:
    """Three processes count to twenty each; were two to write at once, a count would be lost."""
    command = [sys.executable, "-c", WRITER, str(cache.folder)]
    for process in [subprocess.Popen(command) for _ in range(3)]:
        assert process.wait(timeout=120) == 0
    found = cache.get(Key("statistics", {"n": 1}))
    assert found is not None and int(found.tensors["count"]) == 60


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder that looks a little like a cache, and is somebody's own."""
    place = tmp_path / "photos"
    for name in ("2024/summer", f"statistics/{key().digest}", "set_aside/mail"):
        (place / name).mkdir(parents=True)
        (place / name / "cat.png").write_bytes(b"x" * 1000)
    return place


def test_a_folder_that_holds_other_things_is_refused_and_left_alone(photos: Path) -> None:
    before = tree(photos)
    cache = Cache(photos, limit_bytes=0)
    assert cache.entries() == [] and cache.evict() == []
    for use in (
        cache.check,
        cache.claim,
        lambda: cache.put(key(), Entry(tensors(), COST)),
        lambda: cache.locked([key()]).__enter__(),
    ):
        with pytest.raises(
            StorageError, match=r"is not a cache .* holds 2024 .* set runtime\.cache"
        ):
            use()
    assert tree(photos) == before


def test_only_entries_are_counted_and_evicted(cache: Cache, photos: Path) -> None:
    """Also where somebody has put things of their own into a cache."""
    cache.put(key(), Entry(tensors(), COST))
    (size,) = [kept.size_bytes for kept in cache.entries()]
    for path in photos.rglob("*"):
        target = cache.folder / path.relative_to(photos)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    other = cache.folder / "spectra" / key("b").digest
    other.mkdir(parents=True)
    (other / "header.json").write_text("{}")
    assert [kept.size_bytes for kept in cache.entries()] == [size + 1000]  # The cat in the entry.
    before = tree(cache.folder)
    assert len(Cache(cache.folder, 0).evict()) == 1
    gone = {name for name in before if key().digest in name}
    assert tree(cache.folder) == {name: v for name, v in before.items() if name not in gone}


def test_links_are_not_followed(cache: Cache, photos: Path) -> None:
    cache.put(key(), Entry(tensors(), COST))
    before = tree(photos)
    kinds = cache.folder / "spectra"
    kinds.symlink_to(photos / "statistics")
    (cache.folder / "statistics" / key("b").digest).symlink_to(photos / "2024")
    stale = partial_of(cache.folder / "statistics" / "x")
    stale = stale.with_name(stale.name.replace(f".{os.getpid()}.", ".4194999."))
    stale.symlink_to(photos)
    assert cache.get(key("b")) is None and cache.get(Key("spectra", {})) is None
    assert len(cache.entries()) == 1
    assert len(Cache(cache.folder, 0).evict()) == 1
    assert not stale.is_symlink()
    cache.put(key("b"), Entry(tensors(), COST))  # In the link's place.
    cache.put(Key("spectra", {}), Entry(tensors(), COST))
    assert not kinds.is_symlink() and len(cache.entries()) == 2
    assert tree(photos) == before


def test_what_a_killed_eviction_left_does_not_stop_the_next_one(cache: Cache) -> None:
    cache.put(key(), Entry(tensors(), COST))
    (kept,) = cache.entries()
    left = partial_of(kept.path)
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert Cache(cache.folder, 0).evict() == [kept]
    assert cache.entries() == [] and not left.exists()


def test_the_command_that_prunes_leaves_other_folders_alone(photos: Path) -> None:
    before = tree(photos)
    with pytest.raises(StorageError, match="is not a cache"):
        command.main([f"runtime.cache={photos}", "keep_gib=0"])
    assert tree(photos) == before
    empty = photos / "2024" / "new"
    assert "keeps nothing" in command.main([f"runtime.cache={empty}"])


def test_an_empty_folder_becomes_a_cache_whoever_else_is_at_it(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / f".{MARK}.0123abcd.77.partial").write_text("half")
    Cache(folder).claim()
    Cache(folder).check()
    assert (folder / MARK).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    with pytest.raises(StorageError, match="is no folder"):
        Cache(folder / MARK).claim()
