"""Sweeps in real processes: killed at random moments, started twice at once, on a full disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import ROOT, SWEEP, Sweep, same, torment
from test_execution import overrides, small_source

from experiments import dashboard as page
from experiments import draw, render
from iosvd.runs.config import compose_run
from iosvd.runs.execution import Outcome, execute
from iosvd.sweeps.expansion import sweep_jobs

# Long enough that a kill lands in every stage.
_WORK = ("calibration.windows=60", "runtime.batch_tokens=16")
_WORKERS = ("launcher=joblib", "runtime.workers=2", "runtime.threads=1")


def sweep(source: Path, place: str, *more: str) -> Sweep:
    given = [o for o in overrides(source, *SWEEP, *_WORK, *more) if "results" not in o]
    return Sweep(tuple(given), source / place)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> Sweep:
    whole = sweep(source, "whole", *_WORKERS)
    whole.finish()
    return whole


@pytest.mark.parametrize(
    "kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_sweep_that_is_killed_ends_as_if_it_had_not_been(
    kills: int, source: Path, undisturbed: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = sweep(source, f"killed_{kills}", *_WORKERS)
    seed = time.time_ns() % 10**6
    moments = torment(killed, undisturbed, kills, seed)
    with capsys.disabled():  # Without the seed a failure could not be had again.
        listed = " ".join(f"{moment:.2f}" for moment in moments)
        sys.stdout.write(f"\nseed {seed}; killed after {listed} s; ")


# Ends the process as soon as a function has returned, before what it wrote has its own name.
_DYING = """
import os, runpy, signal, sys
from {module} import {holder}
original = {holder}.{name}
def dying(*args, **options):
    original(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
{holder}.{name} = dying
del sys.argv[0]  # Python's "-c".
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def die_after(swept: Sweep, where: str, name: str, *command: str) -> None:
    """Run a command that is killed when it has first called a function, `module:class`'s."""
    module, _, holder = where.partition(":")
    script = _DYING.format(module=module, holder=holder, name=name)
    process = swept.start_script("-c", script, *command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output


def test_a_kill_while_a_checkpoint_is_saved_leaves_nothing(source: Path) -> None:
    one = sweep(source, "saved")
    single = [o for o in one.arguments if not o.startswith(("experiment=", "method=", "ratio="))]
    given = [*single, "method=io_svd", "ratio=0.5", "runtime.save_checkpoint=true"]
    command = ("experiments/compress.py", *given)
    die_after(one, "transformers:PreTrainedModel", "save_pretrained", *command)
    (partial,) = one.results.rglob("*.partial")
    assert partial.is_dir() and (partial / "model.safetensors").exists()
    assert execute(compose_run(given)) is Outcome.complete
    assert one.left_over() == []
    assert len(list(one.results.rglob("checkpoint/model.safetensors"))) == 1


def test_a_kill_while_a_table_a_figure_or_the_page_is_written_leaves_nothing(
    undisturbed: Sweep,
) -> None:
    table, given = undisturbed.table(), undisturbed.arguments
    drawn = ["experiment=main" if option == "experiment=demo" else option for option in given]
    results = str(undisturbed.results)
    files = "iosvd.system.files:os"
    commands: tuple[tuple[str, str, Callable[[], Any], list[str]], ...] = (
        (files, "fsync", lambda: render.render(given), ["render", *given]),
        ("matplotlib.figure:Figure", "savefig", lambda: draw.draw(drawn), ["draw", *drawn]),
        (
            "iosvd.system.files:os",
            "fsync",
            lambda: page.write(Path(results)),
            ["dashboard", results],
        ),
    )
    for where, name, again, (script, *options) in commands:
        die_after(undisturbed, where, name, f"experiments/{script}.py", *options)
        assert len(list(undisturbed.results.rglob("*.partial"))) == 1
        again()
        assert undisturbed.left_over() == []
    assert undisturbed.table() == table


@pytest.mark.parametrize("moment", ["imports", "workers start", "workers compute"])
def test_ctrl_c_ends_a_sweep_in_one_line(moment: str, source: Path) -> None:
    """As a terminal does it: the launcher and its workers all get the signal."""
    stopped = sweep(source, f"stopped_{moment.replace(' ', '_')}", *_WORKERS)
    output: list[str] = []

    def interrupt(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGINT)
        output.append(process.communicate(timeout=60)[0])
        assert process.returncode == 130

    if moment == "workers compute":
        assert stopped.killed(1.0, interrupt)
    else:
        process = stopped.start()
        # The launcher, two trackers of resources, and a worker that imports.
        while moment == "workers start" and len(stopped.processes(process.pid)) < 4:
            time.sleep(0.01)
        time.sleep(0.5)
        interrupt(process)
    assert "Traceback" not in output[0]
    lines = [line for line in output[0].splitlines() if "interrupted" in line]
    assert lines == ["interrupted; run the same command again to resume"]


def test_two_sweeps_at_once_compute_every_run_once(source: Path, undisturbed: Sweep) -> None:
    one = sweep(source, "both")
    processes = [one.start(), one.start()]
    output = ""
    for process in processes:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        output += text
    done = re.findall(r"\] complete: (.*)", output)
    names = sorted(Path(path).name for path in done)
    assert len(names) == len(set(names)) == len(sweep_jobs(one.arguments)) == 5
    same(one, undisturbed)
    again = one.finish()
    assert "5 runs, 5 of them complete" in again and "begins" not in again


def test_a_full_disk_leaves_one_line_and_nothing_half_written(source: Path) -> None:
    """In a mount namespace of its own, which ends with the process."""
    place = source / "small_disk"
    place.mkdir()
    given = " ".join(f"'{line}'" for line in overrides(source, f"runtime.results={place}"))
    script = (
        f"mount -t tmpfs -o size=48k tmpfs {place} || exit 77;"
        f" {sys.executable} experiments/compress.py {given}; echo status $?;"
        f" find {place} -name '*.partial' -printf 'left over: %p\\n';"
        f" find {place} -name metrics.json"
    )
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if found.returncode == 77:
        pytest.skip(f"no tmpfs can be mounted here: {found.stderr.strip()}")
    assert "status 1" in found.stdout
    (line,) = [line for line in found.stdout.splitlines() if "failed: " in line]
    assert "no space left for" in line and "runtime.cache_gib" in line
    assert "left over" not in found.stdout and "metrics.json" not in found.stdout
    assert "Traceback" not in found.stdout + found.stderr
