"""A file is written whole or not at all, and a changed bit is seen."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostile import sentinels, tree
from safetensors import SafetensorError

from iosvd.errors import StorageError
from iosvd.system.files import (
    own_folder,
    partial_of,
    remove,
    remove_abandoned,
    remove_partial,
    write_text,
    written_whole,
)
from iosvd.system.json_files import (
    DamagedError,
    read_json,
    read_sealed,
    typed,
    write_json,
    write_sealed,
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
    with pytest.raises(StorageError, match="no; ask its owner"), written_whole(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "x"):
        raise FileNotFoundError(errno.ENOENT, "no")
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


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    mine = sentinels(tmp_path / "mine")
    before = tree(mine)
    for target in (mine, mine / "mail.txt", mine / "gone"):
        link = tmp_path / ".x.partial"
        link.symlink_to(target)
        remove_partial(tmp_path)
        assert not link.is_symlink()
    folder = tmp_path / "folder"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "link").symlink_to(mine)
    remove(folder)
    remove(folder)  # It is gone already.
    assert not folder.exists() and tree(mine) == before


def test_a_link_in_the_place_of_what_is_written_is_replaced(tmp_path: Path) -> None:
    mine = sentinels(tmp_path / "mine")
    before = tree(mine)
    for path in (tmp_path / "a.json", partial_of(tmp_path / "a.json")):
        path.symlink_to(mine / "mail.txt")
    write_json(tmp_path / "a.json", {"x": 1})
    (tmp_path / "own").symlink_to(mine)
    assert own_folder(tmp_path, "own", "inside").is_dir()
    assert not (tmp_path / "own").is_symlink() and not (tmp_path / "a.json").is_symlink()
    assert tree(mine) == before


def test_only_what_writers_that_ended_have_left_is_abandoned(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours = partial_of(tmp_path / "x")
    dead = ours.with_name(ours.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    there, long_ago = tmp_path / ".x.00000000.1.partial", tmp_path / ".y.00000000.1.partial"
    for path in (ours, dead, there, long_ago):
        path.write_text("half")
    os.utime(long_ago, (0, 0))
    remove_abandoned(tmp_path, "z")
    assert len(list(tmp_path.iterdir())) == 4
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([ours, there])
    remove_abandoned(tmp_path / "no such folder")


def test_only_partials_of_ours_are_removed_and_none_behind_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    machine = partial_of(mine / "x").name.split(".")[-3]
    names = (".film.mp4.partial", f".x.{machine}.99999999999999999999.partial", ".partial")
    for name in names:
        (mine / name).write_text("half")
        os.utime(mine / name, (0, 0))
    remove_abandoned(mine)
    (tmp_path / "link").symlink_to(mine)
    dead = mine / f".x.{machine}.4194999.partial"
    dead.write_text("half")
    remove_abandoned(tmp_path / "link")
    assert dead.exists() and all((mine / name).exists() for name in names)
    remove_abandoned(mine)
    assert not dead.exists() and all((mine / name).exists() for name in names)


def test_a_process_with_the_number_of_a_dead_one_does_not_keep_its_partials(tmp_path: Path) -> None:
    """As in a container, where the first process always has the same number."""
    left = partial_of(tmp_path / "x")
    left.write_text("half")
    long_ago = psutil.Process().create_time() - 100
    os.utime(left, (long_ago, long_ago))
    remove_abandoned(tmp_path)
    assert not left.exists()


def test_a_number_that_json_does_not_know_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="would hold NaN or infinity"):
        write_json(tmp_path / "a.json", {"x": [float("nan")]})
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class _Inner:
    count: int
    share: float | None
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Outer:
    inner: dict[str, _Inner]
    anything: Any = None


def test_json_is_checked_against_types(tmp_path: Path) -> None:
    good = {"inner": {"a": {"count": 2, "share": 1, "other": []}}, "anything": [{}]}
    assert typed(_Outer, good, "x") == _Outer({"a": _Inner(2, 1.0)}, [{}])
    for bad, message in (
        ([], "x is a list, not an object"),
        ({}, "x has no inner"),
        ({"inner": None}, "x.inner is null, not dict"),
        ({"inner": {"a": {"count": True, "share": 1}}}, "x.inner.a.count is true, not int"),
        ({"inner": {"a": {"count": 1, "share": "1"}}}, 'x.inner.a.share is "1", not float'),
        ({"inner": {"a": {"count": 1, "share": 10**400}}}, "share is too large a number"),
        ({"inner": {"a": {"count": 1, "share": 1, "names": [1]}}}, r"names\[0\] is 1, not str"),
    ):
        with pytest.raises(DamagedError, match=message):
            typed(_Outer, bad, "x")
    path = tmp_path / "x.json"
    for text, message in (
        (b"[" * 10**5, "nested too deep"),
        (b'{"x": NaN}', "holds NaN"),
        (b'{"x": 1e999}', "holds 1e999"),
        (b"[1]", "holds a list, not an object"),
        (b"\xff", "is not text"),
        (b"{", "is not JSON"),
    ):
        path.write_bytes(text)
        with pytest.raises(DamagedError, match=message):
            read_json(path)
