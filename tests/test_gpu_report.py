"""The GPU report at its smallest size, on a CPU, as on a machine that has little installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_presets import HIDING

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.setting import SIZES, Setting

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setting() -> Setting:
    """Built when the test starts: its time runs from then on."""
    return Setting(torch.device("cpu"), SIZES["tiny"])


def test_the_report_needs_no_extra_and_every_part_works(tmp_path: Path) -> None:
    hidden = {"omegaconf", "hydra", "lm_eval", "datasets", "pandas", "wandb", "matplotlib", "peft"}
    started = "import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    script = f"EXTRAS = {hidden}\n{HIDING}\n{started}"
    command = [sys.executable, "-c", script, "size=tiny", f"out={tmp_path}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    (written,) = tmp_path.glob("gpu-*.json")
    tables = {t["title"]: t for t in json.loads(written.read_text())["tables"]}
    assert {"Ceilings", "Compression, tiny", "Numbers", "Decoding", "One factorisation"} <= set(
        tables
    )
    assert not [
        t for t in tables.values() if any({"failed", "skipped"} & set(r) for r in t["rows"])
    ]
    methods = [row["method"] for row in tables["Compression, tiny"]["rows"]]
    assert methods == ["svd_llm", "io_svd", "io_svd_spectral", "io_svd_plus", "io_svd_anchored"]
    exact = {row["dtype"]: row for row in tables["Numbers"]["rows"]}["float32"]
    assert float(exact["R"]) < 1e-5 and float(exact["C"]) < 1e-4
    assert "# GPU report" in found.stdout and (tmp_path / f"{written.stem}.md").exists()


def test_a_part_that_fails_or_comes_too_late_is_a_row(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Setting) -> list:
        written = json.loads(next(tmp_path.glob("*.json")).read_text())
        assert [table["title"] for table in written["tables"]] == ["Tests"]  # Already on disk.
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(gpu, "PARTS", {"First": gpu.tests, "Second": fails, "Third": gpu.tests})
    gpu.main(["size=tiny", f"out={tmp_path}"])
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    first, second, third = written["tables"]
    assert second["rows"] == [{"failed": "RuntimeError: no such kernel"}]
    assert first["title"] == third["title"] == "Tests"
    late = [
        table for tables in gpu.report(replace(setting, seconds_at_most=0.0)) for table in tables
    ]
    assert {str(table.rows) for table in late} == {"[{'skipped': 'no time was left'}]"}


def test_a_row_that_fails_leaves_the_others_alone(setting: Setting) -> None:
    def fails() -> dict[str, str]:
        raise MemoryError("of the card")

    assert setting.row({"method": "a"}, 0.0, fails) == {
        "method": "a",
        "failed": "MemoryError: of the card",
    }
    late = replace(setting, seconds_at_most=1.0)
    assert late.row({"method": "b"}, 60.0, fails) == {"method": "b", "skipped": "no time was left"}


def test_an_option_that_does_not_exist_is_one_line() -> None:
    for argument, reason in (("sise=7b", "unknown option sise"), ("size=9b", "size=9b is none of")):
        command = [sys.executable, "-m", "benchmarks.gpu", argument]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert found.returncode == 2
        assert found.stderr.count("\n") == 1 and f"error: {reason}" in found.stderr
