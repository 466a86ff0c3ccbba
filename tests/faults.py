"""A small sweep with two workers, in processes of its own, that is killed and launched again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from experiments import render
from iosvd.runs.records import read_metrics
from iosvd.sweeps.gpus import VISIBLE, lease_one

ROOT = Path(__file__).parents[1]
SWEEP = ("experiment=demo", "eval=own", "method=svd_llm,io_svd", "ratio=0.8,0.5")
TIMED = ("seconds", "stages", "compression_seconds", "started", "computed_here", "config")
GPUS = ("0", "1")  # That there are none makes no difference to their leases.
_PATIENCE_SECONDS = 300.0
_LOOK_SECONDS = 0.01
ACTIVE_SECONDS = 8.0  # From the first worker's beginning to the end of the sweep, and a little.
Kill = Callable[["subprocess.Popen[str]"], None]


@dataclass(frozen=True)
class Sweep:
    """One sweep on one results folder."""

    overrides: tuple[str, ...]
    results: Path

    @property
    def arguments(self) -> list[str]:
        return [*self.overrides, f"runtime.results={self.results}"]

    @property
    def temporary(self) -> Path:
        """Where its processes keep what the system may forget, their leases among it."""
        folder = self.results.with_name(f"{self.results.name}_tmp")
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, *more: str) -> subprocess.Popen[str]:
        """Launch it, in a session of its own whose processes can be found and killed."""
        return self.start_script("experiments/compress.py", "-m", *self.arguments, *more)

    def start_script(self, *command: str) -> subprocess.Popen[str]:
        """Start Python with a script or its text, as `start` does."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(self.temporary),
            VISIBLE: ",".join(GPUS),
        }
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *more: str) -> str:
        """Launch it and return what it printed."""
        process = self.start(*more)
        output, _ = process.communicate(timeout=_PATIENCE_SECONDS)
        assert process.returncode == 0, output
        return output

    def killed(self, seconds: float, kill: Kill) -> bool:
        """Launch it and kill it so long after the first worker began; False if it ended before."""
        process, before = self.start(), self._touched()
        limit = time.monotonic() + _PATIENCE_SECONDS
        while self._touched() == before and process.poll() is None:
            assert time.monotonic() < limit, "no worker began"
            time.sleep(_LOOK_SECONDS)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            self._assert_nothing_lives(process.pid)
            return True
        process.communicate()
        return False

    def _assert_nothing_lives(self, session: int) -> None:
        limit = time.monotonic() + 20
        while self.processes(session) and time.monotonic() < limit:
            time.sleep(0.1)
        assert self.processes(session) == []
        for folder in self.temporary.glob("iosvd-gpus-*"):
            for lock, _ in [lease_one(GPUS, folder) for _ in GPUS]:
                lock.release()

    def _touched(self) -> float:
        """When a run's lock, or an entry's, was last made."""
        places = [self.results / "runs" / ".locks", self.results / "cache" / "locks"]
        times = [p.stat().st_mtime for p in places if p.exists()]
        folders = [p.stat().st_mtime for p in self.results.glob("runs/*/*")]
        return max([*times, *folders], default=0.0)

    def measured(self) -> dict[str, Any]:
        """Return all that the runs hold but for what was timed."""
        found: dict[str, Any] = {}
        for path in sorted((self.results / "runs").glob("*/*/metrics.json")):
            metrics = read_metrics(path.parent)
            assert metrics["config"]["runtime"]["results"] == str(self.results)
            found[path.parent.name] = {k: v for k, v in metrics.items() if k not in TIMED}
            for name in ("plan.json", "answers.json"):
                found[path.parent.name][name] = json.loads((path.parent / name).read_text())
            for file in path.parent.rglob("*.safetensors"):
                found[path.parent.name][str(file.relative_to(path.parent))] = file.read_bytes()
        return found

    def table(self) -> str:
        """Render its table and return the rows, without the column of seconds."""
        render.render(self.arguments)
        (path,) = (self.results / "tables").glob("*.csv")
        rows = [line.split(",") for line in path.read_text().splitlines()]
        timed = [place for place, name in enumerate(rows[0]) if name in TIMED]
        assert timed
        kept = [[cell for i, cell in enumerate(row) if i not in timed] for row in rows]
        return "\n".join(",".join(row) for row in kept)

    def left_over(self) -> list[Path]:
        """Return files that no finished sweep needs, but for those of its checkpoints."""
        kept = ("metrics.json", "plan.json", "answers.json", "spectra.safetensors", "config.yaml")
        kept = (*kept, "checkpoint")
        runs = [p for p in self.results.glob("runs/*/*/*") if p.name not in kept]
        return [*runs, *self.results.rglob("*.partial"), *self.results.rglob("failure.json")]

    def processes(self, session: int) -> list[psutil.Process]:
        """Return the processes of a session that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if os.getsid(process.pid) == session and alive:
                    found.append(process)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return found


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a sweep with all its workers, as a machine that goes down does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_alone(number: signal.Signals) -> Kill:
    """Return what sends a signal to the launcher alone, as `kill PID` does."""

    def kill(process: subprocess.Popen[str]) -> None:
        process.send_signal(number)
        process.communicate()  # Until the last worker has let go of its output, too.

    return kill


KILLS = (kill_all, kill_alone(signal.SIGTERM), kill_alone(signal.SIGKILL))


def torment(sweep: Sweep, undisturbed: Sweep, kills: int, seed: int) -> list[float]:
    """Kill a sweep at random moments, and compare what it ends with each time that it ends.

    It is killed with all its workers or, in turn, its launcher alone; either way no process and
    no lease may be left.

    Args:
        sweep: on an empty folder.
        undisturbed: the same, complete.
        kills: how many times it is killed.
        seed: of the moments; they are returned.
    """
    chooser, moments = random.Random(seed), list[float]()
    started = time.monotonic()
    for _ in range(10 * kills):
        if len(moments) == kills:
            break
        done = len(list(sweep.results.glob("runs/*/*/metrics.json")))
        span = max(0.5, (1 - done / len(undisturbed.measured())) * ACTIVE_SECONDS)
        moment = chooser.uniform(0, span)
        if sweep.killed(moment, KILLS[len(moments) % len(KILLS)]):
            moments.append(moment)
            continue
        same(sweep, undisturbed)  # It ended before: from the beginning, then.
        for path in sweep.results.rglob("*"):
            if path.is_file() and path.name != "CACHEDIR.TAG":
                path.unlink()
    assert len(moments) == kills, (
        f"only {len(moments)} moments in {time.monotonic() - started:.0f} s"
    )
    sweep.finish()
    same(sweep, undisturbed)
    return moments


def same(sweep: Sweep, undisturbed: Sweep) -> None:
    """Assert that a sweep's runs, files and table are those of the undisturbed one."""
    assert sweep.measured() == undisturbed.measured()
    assert sweep.left_over() == []
    assert sweep.table() == undisturbed.table()
