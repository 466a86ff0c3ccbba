"""A record names the commit of the code, and whether the code was changed since."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import iosvd.system.versions
from iosvd.system.versions import commit, library_versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_tells_changed_code_from_changed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iosvd.system.versions, "_ROOT", tmp_path)
    assert commit() == "unknown"
    git(tmp_path, "init")
    assert commit() == "unknown"  # Nothing committed yet.
    for folder in ("iosvd", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert commit() == head
    (tmp_path / "results" / "file").write_text("2")
    assert commit() == head
    (tmp_path / "iosvd" / "new.py").write_text("2")
    assert commit() == f"{head}+dirty"


def test_versions_name_the_libraries_that_results_depend_on() -> None:
    found = library_versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "iosvd", "transformers", "lm_eval"} <= set(found)
