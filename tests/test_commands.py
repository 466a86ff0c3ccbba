"""Every command explains itself, expands ~ in paths and writes to terminals that are not UTF-8."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from iosvd.errors import ConfigError, ModelError
from iosvd.models.loading import ASSETS
from iosvd.runs.config import compose_run
from iosvd.runs.execution import Outcome, execute
from iosvd.sweeps.expansion import expand
from iosvd.system.commands import with_home
from iosvd.system.hub_cache import unwritable_cache

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    path
    for folder in ("experiments", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8") and path.stem != "compress"
)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, check=False
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_every_command_says_what_it_does(
    command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(command), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(command), run_name="__main__")
    assert not ended.value.code
    first = command.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    assert first in capsys.readouterr().out


def test_hydra_says_what_the_main_command_does() -> None:
    done = run(["experiments/compress.py", "--help"])
    assert done.returncode == 0 and b"== Configuration groups ==" in done.stdout


def test_a_terminal_that_is_not_utf8_shows_what_it_can(tmp_path: Path) -> None:
    """The titles of tables have arrows."""
    options = ["experiment=demo", f"runtime.results={tmp_path}"]
    done = run(["experiments/render.py", *options], PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert b"ppl ?" in done.stdout
    assert "ppl ↓" in (tmp_path / "tables" / "demo-tiny.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_path_may_begin_with_the_home_folder(quote: str) -> None:
    home = str(Path.home())
    assert (
        with_home(f"model.path={quote}~/model{quote}") == f"model.path={quote}{home}/model{quote}"
    )
    assert with_home(f"model.path={quote}~{quote}") == f"model.path={quote}{home}{quote}"
    assert with_home("key=~/a,~/b") == f"key={home}/a,{home}/b"
    for same in ("model.path=a~/b", "~/b", "model.path=~user/b", "x=1", "~key"):
        assert with_home(same) == same


@pytest.mark.parametrize("name", ["a=b", "m#1", "modèle", "x,y", "v1(2)", "it's", "a b"])
def test_a_path_with_characters_of_hydras_grammar_is_quoted(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.symlink_to(ASSETS / "tiny")
    quoted = f'model.path="{folder}"'
    assert compose_run(["model=local", quoted]).model.path == str(folder)
    try:
        assert compose_run(["model=local", f"model.path={folder}"]).model.path == str(folder)
    except ConfigError as error:
        assert "\n" not in str(error)
        shown = str(error).partition("for the shell: ")[2]
        assert shlex.split(shown) == [quoted]
    try:
        assert expand(["model=local", f"model.path={folder}", "ratio=0.5,0.6"], sweep=True)
    except ConfigError as error:  # A comma divides the values of a sweep: no folder of that name.
        assert "for the shell: " in str(error) or "is not a model folder" in str(error)
    except ModelError as error:
        assert "," in name and "is not a model folder" in str(error)


def test_the_error_of_a_resolver_is_shown_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError) as error:
        compose_run(["model=local", f"model.path={tmp_path}"])
    assert str(error.value).startswith(f"{tmp_path}/config.json does not name the model's context")


def test_a_cache_of_hugging_face_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "home"
    monkeypatch.setenv("HF_HOME", str(place))
    denied = PermissionError(errno.EACCES, "Permission denied", str(place / "datasets"))
    wrapped = RuntimeError("no items")
    wrapped.__cause__ = denied
    for error in (denied, wrapped):
        assert re.search(r"cannot write their cache .*; set HF_HOME", str(unwritable_cache(error)))
    other = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "results"))
    assert unwritable_cache(other) is None and unwritable_cache(ValueError()) is None


def test_a_disk_without_locks_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    options = [f"runtime.results={tmp_path}", "calibration.windows=2", "eval.windows=2"]
    assert execute(compose_run(["method=svd", *options])) is Outcome.failed
    (failure,) = tmp_path.glob("runs/*/*/failure.json")
    assert "has no file locks" in json.loads(failure.read_text())["error"]
