"""Sweeps in real processes: killed at random moments, started twice at once, on a full disk."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import ROOT, SWEEP, Sweep, torment
from test_execution import overrides, source  # noqa: F401 (a fixture)

from iosvd.sweeps import sweep_jobs

# Long enough that a kill lands in every stage.
_WORK = ("calibration.windows=60", "runtime.batch_tokens=16")
_WORKERS = ("launcher=joblib", "runtime.workers=2", "runtime.threads=1")


def sweep(source: Path, place: str, *more: str) -> Sweep:  # noqa: F811
    given = [o for o in overrides(source, *SWEEP, *_WORK, *more) if "results" not in o]
    return Sweep(tuple(given), source / place)


@pytest.mark.parametrize(
    "kills", [5, pytest.param(20, marks=pytest.mark.faults)], ids=["short", "long"]
)
def test_a_sweep_that_is_killed_ends_as_if_it_had_not_been(
    kills: int,
    source: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    undisturbed, killed = (sweep(source, place, *_WORKERS) for place in ("whole", "killed"))
    started = time.monotonic()
    undisturbed.finish()
    took = time.monotonic() - started
    seed = time.time_ns() % 10**6
    moments = torment(killed, undisturbed, kills, seed)
    with capsys.disabled():  # Without the seed a failure could not be had again.
        listed = " ".join(f"{moment:.2f}" for moment in moments)
        sys.stdout.write(f"\nseed {seed}; undisturbed {took:.1f} s; killed after {listed} s; ")


def test_two_sweeps_at_once_compute_every_run_once(source: Path) -> None:  # noqa: F811
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
    alone = sweep(source, "alone")
    alone.finish()
    assert one.table() == alone.table()
    assert one.measured() == alone.measured()
    again = one.finish()
    assert "5 runs, 5 of them complete" in again and "begins" not in again


def test_a_full_disk_leaves_one_line_and_nothing_half_written(source: Path) -> None:  # noqa: F811
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
