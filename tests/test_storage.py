"""A file is written whole or not at all, and a changed bit is seen."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
from safetensors import SafetensorError

from iosvd.errors import StorageError
from iosvd.storage import (
    DamagedError,
    read_sealed,
    remove_partial,
    write_json,
    write_sealed,
    write_text,
    written_whole,
)

VALUE = {"a": 1.25, "b": {"c": [1, 2, None]}, "text": "ρ = 0.6, “quoted” \\ \n"}


def test_what_was_sealed_is_read_back_and_is_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, VALUE)
    assert read_sealed(path) == VALUE
    plain = json.loads(path.read_text())
    assert {key: plain[key] for key in VALUE} == VALUE
    assert list(plain)[-1] == "sha256"


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, VALUE)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(DamagedError):
                read_sealed(path)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            read_sealed(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"x": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_moved_as_a_whole(tmp_path: Path) -> None:
    with written_whole(tmp_path / "entry") as temporary:
        temporary.mkdir()
        (temporary / "one").write_text("1")
        assert not (tmp_path / "entry").exists()
    assert [found.name for found in tmp_path.rglob("*")] == ["entry", "one"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_explained(error: Exception, tmp_path: Path) -> None:
    explained = pytest.raises(StorageError, match=r"no space left for .*x\.bin; free some")
    with explained, written_whole(tmp_path / "x.bin") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), written_whole(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(SafetensorError), written_whole(tmp_path / "x"):
        raise SafetensorError("header too large")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    write_text(tmp_path / "kept", "1")
    (tmp_path / ".x.json.123.partial").write_text("half")
    (tmp_path / ".entry.124.partial").mkdir()
    (tmp_path / ".entry.124.partial" / "inside").write_text("half")
    remove_partial(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["kept"]


def test_two_writers_do_not_share_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with written_whole(tmp_path / "x") as one:
        monkeypatch.setattr(os, "getpid", lambda: random.randint(10**7, 10**8))
        with written_whole(tmp_path / "x") as other:
            assert one != other
            other.write_text("other")
        one.write_text("one")
    assert (tmp_path / "x").read_text() == "one"
