"""Sweeps through Hydra's launchers: what is launched, what is left out, and what happens to it."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import Timeout
from hydra.core.plugins import Plugins
from test_execution import overrides, run, source  # noqa: F401 (a fixture)

import iosvd.sweeps.launching
from experiments import cache as cache_command
from experiments import compress as command
from experiments import status
from iosvd.errors import ConfigError
from iosvd.presets import conf_folder
from iosvd.runs.composition import compose
from iosvd.runs.execution import Outcome, execute, locked
from iosvd.runs.records import run_folder
from iosvd.runs.run import Run
from iosvd.sweeps.expansion import sweep_jobs
from iosvd.sweeps.gpus import lease_one, take_gpu, visible_gpus
from iosvd.sweeps.launching import carry_out
from iosvd.sweeps.status import State, status_of
from iosvd.system.logs import Where, of_run, of_stage

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted(path.stem for path in (conf_folder() / "launcher").glob("*.yaml"))


def small_sweep(source: Path, *more: str) -> list[str]:  # noqa: F811
    return overrides(
        source, "experiment=demo", "eval=own", "method=svd,svd_llm", "ratio=0.5", *more
    )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_composes(name: str) -> None:
    if name == "ray" and importlib.util.find_spec("ray") is None:
        with pytest.raises(ConfigError, match="hydra/launcher/ray"):
            compose(["launcher=ray"])
        return
    composed = compose([f"launcher={name}"])
    assert composed.hydra.launcher._target_.split(".")[0] in ("hydra", "hydra_plugins")


def test_slurm_gets_one_array_of_tasks_with_a_gpu_each() -> None:
    more = ["runtime.threads=5", "hydra.launcher.partition=long"]
    launcher = compose(["launcher=slurm", *more]).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.array_parallelism, launcher.gpus_per_node) == (8, 1)
    assert (launcher.cpus_per_task, launcher.partition) == (5, "long")


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosvd.runs.config.cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    composed = compose(["launcher=joblib"])
    assert (composed.runtime.workers, composed.runtime.threads) == (2, 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    composed = compose(["launcher=joblib"])
    assert (composed.runtime.workers, composed.runtime.threads) == (4, 4)
    assert composed.hydra.launcher.n_jobs == 4 and composed.runtime.gpu_per_worker
    assert compose(["launcher=joblib", "runtime.workers=40"]).runtime.threads == 1


def test_a_sweep_is_one_job_a_run_baselines_first_and_ratios_apart(source: Path) -> None:  # noqa: F811
    sweep = overrides(source, "method=svd,svd_llm", "ratio=1,0.5")
    jobs = sweep_jobs([*sweep, "hydra.launcher.n_jobs=2", "launcher=joblib"])
    # At ratio 1 plain SVD is the dense model.
    assert [job.run.label for job in jobs] == ["dense", "svd_llm", "svd", "svd_llm"]
    assert [job.run.goal.ratio for job in jobs] == [1, 1, 0.5, 0.5]
    assert not any(line.startswith("hydra") for job in jobs for line in job.overrides)


@pytest.mark.parametrize(
    "launcher", ["serial", "joblib runtime.workers=2", "submitit_local"], ids=lambda x: x.split()[0]
)
def test_every_launcher_carries_out_the_same_sweep(launcher: str, source: Path) -> None:  # noqa: F811
    """Also with a run that fails, which stops no other and is named at the end."""
    sweep = small_sweep(source, "ratio=0.01,0.5")
    name, *more = launcher.split()
    command_line = [sys.executable, "experiments/compress.py", "-m", *sweep, f"launcher={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command_line, *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 1, found.stdout + found.stderr
    assert "2 of 5 runs failed" in found.stdout
    assert "ratio 0.01 is below" in found.stdout
    states = [status_of(job.run).state for job in sweep_jobs(sweep)]
    assert sorted(state.value for state in states) == ["done"] * 3 + ["failed"] * 2
    assert "Traceback" not in found.stdout + found.stderr


def test_a_complete_sweep_launches_nothing(
    source: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sweep = small_sweep(source)
    for job in sweep_jobs(sweep):
        assert execute(job.run) is Outcome.complete
    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: pytest.fail("launched"))
    with caplog.at_level(logging.INFO):
        ended = carry_out(sweep_jobs(sweep), sweep)
    assert {found.state for found in ended} == {State.done}
    assert "3 runs, 3 of them complete" in caplog.text


@pytest.mark.parametrize("kills", [1, 2])
def test_a_run_whose_worker_is_killed_is_tried_once_more_and_the_others_go_on(
    kills: int,
    source: Path,  # noqa: F811
) -> None:
    """As the system does it to a process that takes too much memory."""
    workers = ("launcher=joblib", "runtime.workers=2", "runtime.threads=1")
    work = ("calibration.windows=70", "runtime.batch_tokens=16", "method=svd,gfwsvd,svd_llm")
    slow = small_sweep(source, *workers, *work)
    process = subprocess.Popen(
        [sys.executable, "experiments/compress.py", "-m", *slow],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    victim = next(job.run for job in sweep_jobs(slow) if job.run.label == "gfwsvd")
    killed: list[int] = []
    limit = time.monotonic() + 200
    while len(killed) < kills:
        assert process.poll() is None and time.monotonic() < limit
        # The launcher opens the lock too, for a moment: it asks whether the run is free.
        for pid in worker_of(victim) - {process.pid, *killed}:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.01)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == (kills == 2), output
    assert "gfwsvd-0.5" in output and "tried once more" in output
    states = {job.run.label: status_of(job.run) for job in sweep_jobs(slow)}
    if kills == 2:
        found = states.pop("gfwsvd")
        assert found.state is State.failed and "killed twice" in found.reason
        assert execute(victim) is Outcome.complete
    assert {found.state for found in states.values()} == {State.done}, output


def worker_of(asked: Run) -> set[int]:
    """Return the process, if any, that has the lock of a run that has begun."""
    folder = run_folder(asked)
    if not (folder / "config.yaml").exists():
        return set()
    found = set()
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if path.readlink().name == f"{folder.name.rpartition('-')[2]}.lock":
                found.add(int(path.parts[2]))
    return found - {os.getpid()}


def test_status_says_where_every_run_stands(source: Path) -> None:  # noqa: F811
    sweep = small_sweep(source, "method=svd,svd_llm,asvd,io_svd")
    jobs = {job.run.label: job.run for job in sweep_jobs(sweep)}
    assert execute(jobs["dense"]) is Outcome.complete
    run_folder(jobs["svd"]).mkdir()
    run_folder(jobs["svd_llm"]).mkdir()
    (run_folder(jobs["svd_llm"]) / "failure.json").write_text(json.dumps({"error": "first\nrest"}))
    run_folder(jobs["asvd"]).mkdir()
    with locked(jobs["asvd"]):
        lines = status.status(sweep).splitlines()
    assert lines == [
        "interrupted svd 0.5",
        "failed      svd_llm 0.5 first",
        "running     asvd 0.5",
        "missing     io_svd 0.5",
        "5 runs: 1 done, 1 running, 1 failed, 1 interrupted, 1 missing",
    ]


def test_a_flipped_bit_in_a_record_is_a_failure_with_a_remedy(source: Path) -> None:  # noqa: F811
    asked = run(source, "method=svd")
    assert execute(asked) is Outcome.complete
    path = run_folder(asked) / "metrics.json"
    changed = bytearray(path.read_bytes())
    changed[changed.index(b"perplexity") + 20] ^= 1
    path.write_bytes(changed)
    found = status_of(asked)
    assert found.state is State.failed
    assert "does not match its checksum; remove it and run again" in found.reason
    assert execute(asked) is Outcome.failed


def test_only_one_process_carries_out_a_run(source: Path) -> None:  # noqa: F811
    asked = run(source)
    with locked(asked), pytest.raises(Timeout), locked(asked, patience=0.1):
        pytest.fail("entered")


def test_each_worker_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    held = [lease_one(["0", "3"], tmp_path) for _ in range(2)]
    assert [gpu for _, gpu in held] == ["0", "3"]
    with pytest.raises(ConfigError, match="all 2 GPUs of this machine are taken"):
        lease_one(["0", "3"], tmp_path)
    held[1][0].release()
    assert lease_one(["0", "3"], tmp_path)[1] == "3"


def test_a_machine_without_gpus_leases_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    take_gpu.cache_clear()
    assert take_gpu() is None


def test_a_worker_sees_the_gpu_that_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    take_gpu.cache_clear()
    lease = take_gpu()
    assert lease is not None and os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    assert take_gpu() is lease
    take_gpu.cache_clear()
    lease.release()


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,1", ["0"]),
        ("2, 0", ["2", "0"]),
        ("GPU-8932f937-d72c-4106-c12f", ["GPU-8932f937-d72c-4106-c12f"]),
        ("MIG-GPU-89f/1/0,MIG-f3a", ["MIG-GPU-89f/1/0", "MIG-f3a"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    named: str, seen: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert visible_gpus() == seen
    take_gpu.cache_clear()
    lease = take_gpu()
    take_gpu.cache_clear()
    assert (lease is None) == (seen == [])
    if lease is not None:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen[0]
        lease.release()
    assert all(path.parent.parent == tmp_path for path in tmp_path.rglob("*.lock"))


def test_a_user_without_a_name_gets_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that was started with a number for a user."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(KeyError("uid 12345")))
    take_gpu.cache_clear()
    lease = take_gpu()
    take_gpu.cache_clear()
    assert lease is not None
    lease.release()


HOLDER = """
import os, sys, time
from pathlib import Path
from iosvd.sweeps.gpus import lease_one
lease = lease_one(["0"], Path(sys.argv[1]))
child = os.fork()  # It inherits the lock, as a data loader's does.
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def test_a_lease_names_its_holder_and_is_free_when_that_has_ended(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=rf"taken: 0 by process {holder.pid} \(.+\);"):
            lease_one(["0"], tmp_path)
        holder.kill()
        holder.wait()
        lease, gpu = lease_one(["0"], tmp_path)
        assert gpu == "0"
        with pytest.raises(ConfigError, match=f"taken: 0 by process {os.getpid()}"):
            lease_one(["0"], tmp_path)
        lease.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_log_lines_say_of_which_run_and_stage_they_are() -> None:
    def where() -> str:
        record = logging.LogRecord("x", logging.INFO, "", 0, "text", (), None)
        assert Where().filter(record)
        return str(record.where)  # type: ignore[attr-defined]

    assert where() == ""
    with of_run("svd-0.8"):
        assert where() == "[svd-0.8] "
        with of_stage("statistics"):
            assert where() == "[svd-0.8 | statistics] "
        assert where() == "[svd-0.8] "
    assert where() == ""


def test_the_cache_is_listed_and_pruned(source: Path) -> None:  # noqa: F811
    asked = overrides(source, "method=svd_llm")
    assert "keeps nothing" in cache_command.main(asked)
    assert execute(run(source, "method=svd_llm")) is Outcome.complete
    listing = cache_command.main(asked)
    for kind in ("tokens", "statistics", "spectra"):
        assert kind in listing
    assert "removed: 0 entries" in cache_command.main([*asked, "keep_gib=1"])
    assert "keeps nothing" in cache_command.main([*asked, "keep_gib=0"])
    with pytest.raises(ConfigError, match="keep_gib=much is no number"):
        cache_command.main([*asked, "keep_gib=much"])
    assert execute(run(source, "method=svd_llm", "runtime.force=true")) is Outcome.complete


def test_a_second_launch_is_quick_and_says_so(
    source: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sweep = small_sweep(source)
    monkeypatch.setattr(sys, "argv", ["compress.py", "-m", *sweep])
    assert command.main() == 0
    monkeypatch.setattr(iosvd.sweeps.launching, "_launch", lambda *_: pytest.fail("launched"))
    assert command.main() == 0
    capfd.readouterr()
