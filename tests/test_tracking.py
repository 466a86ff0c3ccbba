"""What wandb holds of a run, read back from disk, is what metrics.json says."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from matplotlib.figure import Figure
from test_execution import metrics, overrides, run, source

import iosvd.runs.execution
import iosvd.runs.measurement
from experiments import compress as command
from iosvd.errors import ConfigError
from iosvd.runs import tracking
from iosvd.runs.config import config_of
from iosvd.runs.execution import Outcome, execute
from iosvd.runs.fingerprints import digest
from iosvd.runs.records import PLAN, TRACKED, run_folder
from iosvd.runs.run import Tracking, TrackingMode

__all__ = ["source"]  # The fixture.


def records(path: Path) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: blocks of 32 KiB, each piece with a header of 7 bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # The rest of a block that no header fits in is padding.
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # All of a record, or its last piece.
            yield whole
            whole = b""


def read_back(folder: Path) -> dict[str, Any]:
    """Return config, summary, id, group and exit code of an offline wandb run, from its records."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    found: dict[str, Any] = {"summary": {}, "config": {}, "artifacts": {}}
    for data in records(path):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            found |= {"id": record.run.run_id, "group": record.run.run_group}
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        for item in record.summary.update:
            *parents, key = item.nested_key or [item.key]
            place = found["summary"]
            for parent in parents:
                place = place.setdefault(parent, {})
            place[key] = json.loads(item.value_json)
        if record.artifact.type == "model":
            contents = record.artifact.manifest.contents
            found["artifacts"][record.artifact.name] = {entry.path for entry in contents}
        if record.HasField("exit"):
            found["exit"] = record.exit.exit_code
    return found


def offline_runs(source: Path) -> list[Path]:
    return sorted((source / "results" / "wandb").glob("offline-run-*"))


def test_an_offline_run_equals_metrics_json_key_for_key(source: Path) -> None:
    asked = run(source, "method=svd_llm", "wandb=offline", "wandb.group=sweep")
    assert execute(asked) is Outcome.complete
    (folder,) = offline_runs(source)
    held = read_back(folder)
    expected = metrics(run_folder(asked))
    media = {"plan", "ranks_figure", "spectra_figure"}
    own = {key: value for key, value in held["summary"].items() if key[0] != "_"}
    assert {key: value for key, value in own.items() if key not in media} == expected
    assert media <= set(own)
    assert (held["id"], held["group"], held["exit"]) == (digest(asked), "sweep", 0)
    config = {key: value for key, value in held["config"].items() if key != "_wandb"}
    assert config == {**config_of(asked), "label": "svd_llm"}
    (table,) = (folder / "files" / "media" / "table").glob("plan_*.table.json")
    rows = json.loads(table.read_text())["data"]
    plan = json.loads((run_folder(asked) / PLAN).read_text())["sites"]
    assert {row[0]: row[3] for row in rows} == {name: site["rank"] for name, site in plan.items()}
    assert len(list((folder / "files" / "media" / "images").glob("*.png"))) == 2


def test_nothing_is_logged_by_default(source: Path) -> None:
    asked = run(source, "method=svd")
    assert asked.runtime.tracking.mode is TrackingMode.disabled
    assert execute(asked) is Outcome.complete
    assert not (source / "results" / "wandb").exists()


def test_a_run_that_failed_is_marked_and_continues_as_the_same_one(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = run(source, "method=svd", "wandb=offline")
    with monkeypatch.context() as patch:
        patch.setattr(iosvd.runs.measurement, "compress_to", lambda *a, **k: 1 / 0)
        assert execute(asked) is Outcome.failed
    assert execute(asked) is Outcome.complete
    held = [read_back(folder) for folder in offline_runs(source)]
    assert {run["id"] for run in held} == {digest(asked)}
    assert sorted(run["exit"] for run in held) == [0, 1]


def test_a_run_that_was_complete_before_is_logged_once(source: Path) -> None:
    execute(run(source, "method=svd"))
    asked = run(source, "method=svd", "wandb=offline")
    assert execute(asked) is Outcome.skipped
    assert (run_folder(asked) / TRACKED).exists()
    assert execute(asked) is Outcome.skipped
    (folder,) = offline_runs(source)
    assert read_back(folder)["summary"]["perplexity"] == metrics(run_folder(asked))["perplexity"]


def test_what_wandb_dies_of_costs_no_measurement(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = run(source, "method=svd", "wandb=offline")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "log_complete", lambda *a, **k: 1 / 0)
        assert execute(asked) is Outcome.complete
    assert (
        "wandb: complete, but not logged; launch it again to log it (division by zero)"
        in caplog.text
    )
    assert not (run_folder(asked) / TRACKED).exists()


def test_wandb_out_of_reach_costs_no_measurement(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def unreachable(**_: Any) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", unreachable)
    assert execute(run(source, "method=svd", "wandb=offline")) is Outcome.complete
    assert "wandb: this run is not logged (no network)" in caplog.text


def test_a_wandb_run_that_cannot_be_finished_costs_no_measurement(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = run(source, "method=svd", "wandb=offline")
    opened = tracking.open_run(asked, "name", "identity")
    monkeypatch.setattr(tracking, "open_run", lambda *_, **__: opened)
    with monkeypatch.context() as patch:
        patch.setattr(type(opened), "finish", lambda *_, **__: 1 / 0)
        assert execute(asked) is Outcome.complete
    opened.finish()
    assert "complete, but not logged" in caplog.text
    assert {path.name for path in run_folder(asked).iterdir()} >= {"metrics.json"}
    assert not (run_folder(asked) / "failure.json").exists()


def test_a_sweep_that_cannot_be_logged_is_a_warning(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    tracking.log_sweep("main-small", run(source, "wandb=offline"), {}, {})
    assert "wandb: the sweep is not logged (division by zero)" in caplog.text


def test_a_checkpoint_is_an_artifact_if_asked(source: Path) -> None:
    kept = ["runtime.save_checkpoint=true", "wandb=offline"]
    assert execute(run(source, "method=svd", *kept)) is Outcome.complete
    (first,) = offline_runs(source)
    assert read_back(first)["artifacts"] == {}
    again = run(source, "method=svd", *kept, "wandb.checkpoint=true", "runtime.force=true")
    assert execute(again) is Outcome.complete
    (second,) = set(offline_runs(source)) - {first}
    (files,) = read_back(second)["artifacts"].values()
    stored = {path.name for path in (run_folder(again) / "checkpoint").iterdir()}
    assert files == stored and "model.safetensors" in stored


def test_a_sweep_has_a_run_of_its_own_with_its_table_and_figures(source: Path) -> None:
    asked = run(source, "wandb=offline", "wandb.group=main")
    frame = pandas.DataFrame([{"method": "svd", "x": 1.5}, {"method": "gap", "x": None}])
    tracking.log_sweep("main-small", asked, {"table": frame}, {"ratio": Figure()})
    (folder,) = offline_runs(source)
    assert read_back(folder)["id"] == "sweep-main-small"
    (table,) = (folder / "files" / "media" / "table").glob("table_*.json")
    assert json.loads(table.read_text())["data"][0] == ["svd", 1.5]


def test_online_without_a_key_ends_at_once_in_one_line(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(source / "none"))
    monkeypatch.setattr(sys, "argv", ["compress.py", *overrides(source, "wandb=online")])
    monkeypatch.setattr(command, "carry_out_one", lambda *_: pytest.fail("a run was started"))
    assert command.main() == 2
    (line,) = [x for x in "".join(capfd.readouterr()).splitlines() if x.startswith("error")]
    assert "there is no key: set WANDB_API_KEY" in line and "wandb=offline" in line


def test_a_key_that_is_none_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    with pytest.raises(ConfigError, match=r"wandb=online, but .*key.*wandb=offline") as caught:
        tracking.check_tracking(Tracking(TrackingMode.online))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")
def test_the_workspace_shows_what_runs_log(source: Path) -> None:
    """Every measure that the committed description names is a key of a run's record."""
    from experiments.workspace import build_workspace

    asked = run(source, "method=svd")
    execute(asked)
    held = metrics(run_folder(asked))
    described = build_workspace("team", "iosvd", ["own"])._to_model().model_dump_json()
    for key in ("perplexity.own", "average_acc", "ratio", "target_bytes"):
        assert f'"{key}"' in described or f"summary:{key}" in described
        assert key.split(".")[0] in held
    for media in ("ranks_figure", "spectra_figure"):
        assert media in described


def test_the_workspace_command_names_what_is_missing() -> None:
    script = Path(__file__).parents[1] / "experiments" / "workspace.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: entity is not set; set entity=USER_OR_TEAM\n",
    )


def test_disabled_tracking_needs_no_check() -> None:
    tracking.check_tracking(Tracking())
