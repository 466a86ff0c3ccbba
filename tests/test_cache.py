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
from torch import Tensor

from iosvd.cache import Cache
from iosvd.stages import Stage
from iosvd.store import Entry, Key

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


def test_what_a_killed_writer_left_is_written_over(cache: Cache) -> None:
    half = cache.folder / "statistics" / f".{key().digest}.99999.partial"
    half.mkdir(parents=True)
    (half / "tensors.safetensors").write_bytes(b"half")
    assert cache.get(key()) is None
    assert cache.entries() == []
    cache.put(key(), Entry(tensors(), COST))
    assert not half.exists()


WRITER = """
import sys, time, torch
from pathlib import Path
from iosvd.cache import Cache
from iosvd.stages import Stage
from iosvd.store import Entry, Key
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
