"""A run measures, records, is skipped when complete and retried when not; nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas
import pytest
import torch
from conftest import build
from hostile import sentinels, tree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import iosvd.runs.execution
import iosvd.runs.measurement
from experiments import compress as command
from experiments import draw, keep, predict, render
from iosvd.errors import ConfigError, IosvdError, RecordError, StorageError
from iosvd.evaluation.perplexity import perplexity
from iosvd.layers.replacement import low_rank_layers
from iosvd.metric import other, perplexity_on
from iosvd.models.loading import ASSETS, load_tokenizer
from iosvd.runs.config import compose_run, config_of
from iosvd.runs.execution import Outcome, execute, locked
from iosvd.runs.fingerprints import digest
from iosvd.runs.records import has_checkpoint, read_metrics, read_record, run_folder
from iosvd.runs.run import Run
from iosvd.runs.steps import cache_of
from iosvd.sweeps.expansion import expand
from iosvd.sweeps.status import Stamps, State, status_of
from iosvd.system.json_files import write_json
from iosvd.tables.table import Column, Table


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_source(tmp_path)


def small_source(place: Path) -> Path:
    """Fill a folder with a small model, of the embedded tokenizer's vocabulary, and a text."""
    folder = place / "small"
    model = build("llama")
    model.resize_token_embeddings(1024)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ASSETS / "tiny" / name).read_bytes())
    text = place / "text"
    text.mkdir()
    lines = "".join(f"Line {i} of a text that is long enough.\n" for i in range(80))
    (text / "train.txt").write_text(lines)
    (text / "validation.txt").write_text(lines[:1500])
    return place


def overrides(source: Path, *more: str) -> list[str]:
    return [
        "model=local",
        f"model.path={source}/small",
        "model.seq_len=16",
        "dataset=local",
        f"dataset.path={source}/text",
        "calibration.windows=8",
        f"runtime.results={source}/results",
        *more,
    ]


def run(source: Path, *more: str) -> Run:
    return compose_run(overrides(source, *more))


def metrics(folder: Path) -> dict[str, object]:
    return read_metrics(folder)


def test_a_run_records_what_its_checkpoint_measures(source: Path) -> None:
    asked = run(source, "ratio=0.5", "runtime.save_checkpoint=true")
    assert execute(asked) is Outcome.complete
    folder = run_folder(asked)
    assert folder.parent == source / "results" / "runs" / "small"
    assert folder.name.startswith("io_svd-0.5-")
    found = metrics(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    tokenizer = load_tokenizer(asked.model)
    windows = iosvd.evaluation_windows(tokenizer, asked.data.dataset, 16)
    assert found["perplexity"] == {"own": pytest.approx(perplexity(loaded.eval(), windows))}
    assert found["windows"] == {"own": list(windows.shape)}
    sizes = {n: layer.rank for n, layer in low_rank_layers(loaded).items()}
    plan = json.loads((folder / "plan.json").read_text())
    assert {n: s["rank"] for n, s in plan["sites"].items() if not s["dense"]} == sizes
    assert 0.45 < found["ratio_achieved"] <= 0.5  # type: ignore[operator]
    assert found["covered_share"] == 1  # Of the weights of the decoder blocks.
    assert set(found["stages"]) == {  # type: ignore[call-overload]
        *("data", "load", "statistics", "factorization", "allocation", "correction"),
        *("quantization", "evaluation", "zero_shot", "questions"),
    }
    assert found["config"] == config_of(asked)


def test_a_complete_run_is_skipped_unless_forced(source: Path) -> None:
    asked = run(source, "method=svd")
    assert execute(asked) is Outcome.complete
    before = (run_folder(asked) / "metrics.json").stat().st_mtime_ns
    assert execute(asked) is Outcome.skipped
    assert (run_folder(asked) / "metrics.json").stat().st_mtime_ns == before
    assert execute(run(source, "method=svd", "runtime.force=true")) is Outcome.complete
    assert (run_folder(asked) / "metrics.json").stat().st_mtime_ns > before


def test_a_failure_is_kept_with_its_traceback_and_tried_again(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = run(source, "method=svd")
    with monkeypatch.context() as patch:
        patch.setattr(iosvd.runs.measurement, "compress_to", lambda *a, **k: 1 / 0)
        assert execute(asked) is Outcome.failed
    folder = run_folder(asked)
    failure = json.loads((folder / "failure.json").read_text())
    assert failure["error"] == "ZeroDivisionError: division by zero"
    assert "in measure" in failure["traceback"]
    assert "failed: ZeroDivisionError" in caplog.text
    assert read_record(folder) is None
    assert execute(asked) is Outcome.complete
    assert not (folder / "failure.json").exists()


def test_the_digest_depends_on_content_not_on_place(source: Path, tmp_path: Path) -> None:
    one = digest(run(source))
    (source / "small").rename(source / "elsewhere")
    (source / "elsewhere" / "small").mkdir()
    for path in (source / "elsewhere").glob("*.*"):
        path.rename(source / "elsewhere" / "small" / path.name)
    moved = compose_run([*overrides(source), f"model.path={source}/elsewhere/small"])
    assert digest(moved) == one
    assert (
        digest(compose_run([*overrides(source / "elsewhere"), f"dataset.path={source}/text"]))
        == one
    )
    (source / "text" / "train.txt").write_text("Another text.\n" * 80)
    assert digest(moved) != one


SCIENTIFIC = [
    "ratio=0.7",
    "calibration.seed=1",
    "calibration.windows=7",
    "calibration.seq_len=12",
    "whitening.top_k=6",
    "whitening.damping_output=1e-5",
    "allocation=spectral",
    "factorization.algorithm=svd",
    "eval.windows=2",
    "model.dtype=bfloat16",
    "dataset.join=x",
    "model.sites.exclude=[x]",
]


@pytest.mark.parametrize("change", SCIENTIFIC)
def test_every_scientific_option_makes_another_run(change: str, source: Path) -> None:
    assert run_folder(run(source, change)) != run_folder(run(source))
    assert digest(run(source, change)) != digest(run(source))


@pytest.mark.parametrize("change", ["runtime.batch_tokens=40", "runtime.device=cpu"])
def test_how_a_run_is_carried_out_does_not(change: str, source: Path) -> None:
    assert run_folder(run(source, change)) == run_folder(run(source))


BAD_RUNS = [
    (["ratio=0.01"], r"ratio 0\.01 is below 0\.\d+, what rank 1 at every one of the 14 sites"),
    (["model.seq_len=64"], "windows of 64 tokens exceed the context of 32.*set model.seq_len=32"),
    (["calibration.windows=100000"], "100000 are asked for"),
    (["model.sites.include=[nothing]"], "no site matches"),
    (["runtime.device=cuda:0"], "torch sees no CUDA device"),
    (["runtime.device=quantum"], "runtime.device=quantum is no device"),
    (["dataset.evaluation.name=test"], "has no test"),
]


@pytest.mark.parametrize(("change", "message"), BAD_RUNS, ids=lambda value: str(value)[:30])
def test_bad_input_ends_in_one_line_and_a_status(
    change: list[str],
    message: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if "cuda" in change[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["compress.py", *overrides(source, *change)])
    assert command.main() != 0
    output = "".join(capfd.readouterr())
    (line,) = [line for line in output.splitlines() if "error: " in line or "failed: " in line]
    assert re.search(message, line)
    assert "Traceback" not in output


def test_a_wrong_command_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compress.py", "-m", "ratio=0.8,7"])
    monkeypatch.setattr(command, "carry_out", lambda *_: pytest.fail("a run was started"))
    assert command.main() == 2
    assert capfd.readouterr().err == (
        "error: ratio 7 is outside (0, 1]; it is the share of the 16-bit model that is kept\n"
    )


def test_one_failing_run_stops_no_other_and_shows_as_a_gap(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ratio 0.01 is infeasible: its runs fail, the others complete, the table has both."""
    sweep = [
        "experiment=demo",
        "eval=own",
        "method=svd,svd_llm",
        "ratio=0.01,0.5",
        "model.name=small-1.5",
    ]
    monkeypatch.setattr(sys, "argv", ["compress.py", "-m", *overrides(source, *sweep)])
    assert command.main() == 1
    assert "2 of 5 runs failed" in "".join(capfd.readouterr())
    render.render(overrides(source, *sweep))
    printed = capfd.readouterr().out
    assert "Runs found: 3 of 5." in printed
    rows = [line.split("|") for line in printed.splitlines() if "| svd" in line]
    for row in rows:
        assert (row[3].strip() == "–") == (row[1].strip() == "0.01")
    tables = source / "results" / "tables"
    assert (tables / "demo-small-1.5.md").read_text() in printed
    assert len((tables / "demo-small-1.5.csv").read_text().splitlines()) == 6


def test_a_damaged_record_fails_the_command(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = run(source, "method=svd")
    assert execute(asked) is Outcome.complete
    (run_folder(asked) / "metrics.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["compress.py", *overrides(source, "method=svd")])
    assert command.main() == 1
    assert "remove it and run again" in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["tokenizer.json", "pytorch_model.bin", "merges.txt"])
def test_every_file_of_a_model_counts(name: str, source: Path) -> None:
    before = digest(run(source))
    path = source / "small" / name
    path.write_text("another" + (path.read_text() if path.exists() else ""))
    assert digest(run(source)) != before


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"label": ')
    with pytest.raises(RecordError, match=r"cannot read .*metrics\.json.*remove it and run again"):
        read_record(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_record_that_cannot_be_trusted_is_a_gap_with_a_reason(
    source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of another protocol, put where this one's should be, and one that is damaged."""
    sweep = overrides(source, "experiment=demo", "eval=own", "method=svd,asvd", "ratio=0.5")
    runs = [run(source, f"method={method}", "ratio=0.5") for method in ("svd", "asvd")]
    for asked in runs:
        assert execute(asked) is Outcome.complete
    other = run(source, "method=svd", "ratio=0.5", "eval.windows=1")
    assert execute(other) is Outcome.complete
    foreign = (run_folder(other) / "metrics.json").read_text()
    (run_folder(runs[0]) / "metrics.json").write_text(foreign)
    (run_folder(runs[1]) / "metrics.json").write_text("{")
    render.render(sweep)
    printed = capfd.readouterr().out
    assert "Runs found: 0 of 3." in printed
    assert f"Set aside: {run_folder(runs[0])} holds the record of another protocol" in printed
    assert f"Set aside: cannot read {run_folder(runs[1])}" in printed
    rows = [line for line in printed.splitlines() if "svd" in line and line.startswith("|")]
    assert len(rows) == 2 and all(row.count("–") == 3 for row in rows)


def test_a_kept_record_stands_in_a_table_and_stops_no_run(
    source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = overrides(source, "experiment=demo", "eval=own", "method=svd,svd_llm", "ratio=0.5")
    asked = run(source, "method=svd", "ratio=0.5")
    assert execute(asked) is Outcome.complete
    render.render(sweep)
    before = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    keep.keep(sweep)
    assert "1 of 3 records kept" in capfd.readouterr().out
    shutil.rmtree(run_folder(asked))
    render.render(sweep)
    printed = capfd.readouterr().out
    assert "Runs found: 1 of 3, 1 of them kept in `results/records`." in printed
    assert [line for line in printed.splitlines() if line.startswith("|")] == before
    assert execute(asked) is Outcome.complete
    render.render(sweep)
    assert "Runs found: 1 of 3. " in capfd.readouterr().out


def test_two_names_of_the_same_run_share_it(source: Path) -> None:
    """A row of an ablation that is a method's own is not measured twice."""
    method = run(source, "method=svd_llm", "ratio=0.5")
    ablation = ["allocation=uniform", "whitening=input", "ratio=0.5"]
    assert execute(method) is Outcome.complete
    same = run(source, "method=io_svd", *ablation)
    assert same.label == "io_svd[allocation=uniform,whitening=input]"
    assert execute(same) is Outcome.skipped
    assert run_folder(same) == run_folder(method)


def test_answers_and_spectra_are_kept(source: Path) -> None:
    tasks = source / "tasks" / "openbookqa"
    tasks.mkdir(parents=True)
    item = {"question_stem": "A", "answerKey": "B"}
    choices = {"text": ["one", "two"], "label": ["A", "B"]}
    lines = [json.dumps({"id": str(i), **item, "choices": choices}) for i in range(5)]
    (tasks / "test.jsonl").write_text("\n".join(lines) + "\n")
    here = ["eval.zero_shot.tasks=[openbookqa]", f"eval.zero_shot.path={source}/tasks"]
    asked = run(source, "method=svd", "ratio=0.5", *here, "eval.zero_shot.limit=3")
    assert execute(asked) is Outcome.complete
    found = metrics(run_folder(asked))
    answers = json.loads((run_folder(asked) / "answers.json").read_text())
    assert len(answers["openbookqa"]) == 3
    assert found["average_acc"] == sum(answers["openbookqa"]) / 3
    assert found["zero_shot"]["openbookqa"]["items"] == 3  # type: ignore[index]
    plan = json.loads((run_folder(asked) / "plan.json").read_text())
    sigma = load_file(run_folder(asked) / "spectra.safetensors")
    for name, site in plan["sites"].items():
        assert len(sigma[name]) == min(site["out_features"], site["in_features"])
        assert float((sigma[name][site["rank"] :] ** 2).sum()) == pytest.approx(
            site["dropped_energy"], rel=1e-4, abs=1e-9
        )
    before = digest(asked)
    (tasks / "test.jsonl").write_text("\n".join(lines[:4]) + "\n")
    assert digest(asked) != before


def test_bytes_are_those_of_the_stored_weights(source: Path) -> None:
    asked = run(source, "method=svd", "ratio=0.5", "runtime.save_checkpoint=true")
    execute(asked)
    found = metrics(run_folder(asked))
    assert found["target_bytes"] == 4 * found["parameters_kept"]  # type: ignore[operator]
    tensors = load_file(run_folder(asked) / "checkpoint" / "model.safetensors")
    plan = json.loads((run_folder(asked) / "plan.json").read_text())["sites"]
    stored = [t for n, t in tensors.items() if n.rpartition(".")[0] in plan]
    assert sum(t.numel() * t.element_size() for t in stored) == found["target_bytes"]


def test_a_sweep_whose_cells_are_the_same_run_is_complete(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ratio 1 plain SVD is the dense model, under another name."""
    sweep = overrides(source, "method=svd", "ratio=1,0.5")
    monkeypatch.setattr(sys, "argv", ["compress.py", "-m", *sweep])
    assert command.main() == 0
    runs = source / "results" / "runs" / "small"
    assert sorted(path.name.rpartition("-")[0] for path in runs.iterdir()) == ["dense-1", "svd-0.5"]
    assert digest(run(source, "method=dense")) == digest(run(source, "method=dense", "ratio=1"))


def test_folders_inside_a_task_folder_do_not_count(source: Path) -> None:
    """Such as the hub client's .cache."""
    folder = source / "tasks" / "openbookqa"
    (folder / ".cache.d").mkdir(parents=True)
    (folder / "test.jsonl").write_text("{}\n")
    here = ["eval.zero_shot.tasks=[openbookqa]", f"eval.zero_shot.path={source}/tasks"]
    assert digest(run(source, *here)) != digest(run(source))


def test_figures_of_a_run_without_its_spectra_are_left_out(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main = ["experiment=main", "model=local", "eval=own", "dataset=local", "ratio=0.6"]
    sweep = [*overrides(source), *main, "method=io_svd"]
    assert execute(expand(sweep, sweep=True)[0]) is Outcome.complete
    paths = {path.name for path in draw.draw(sweep)}
    assert "main-small-ranks-io_svd-0.6.png" in paths and "main-small-ratio.png" in paths
    (spectra,) = (source / "results").rglob("spectra.safetensors")
    spectra.unlink()
    without = {path.name for path in draw.draw(sweep)}
    assert "main-small-ratio.png" in without and not any("io_svd" in name for name in without)
    (line,) = [line for line in caplog.messages if "left out" in line]
    assert "cannot read the spectra in" in line and "run again" in line
    with pytest.raises(ConfigError, match="format=gif is unknown; formats: png, pdf, svg"):
        draw.draw([*sweep, "format=gif"])


def test_a_measured_curve_is_not_called_published() -> None:
    """A column of published values may have the same metric."""
    measured = Column(perplexity_on("wikitext2"), "wikitext2 ppl", 2, -1)
    title = "published, llama_7b: wikitext2 ppl"
    published = Column(perplexity_on("wikitext2"), title, 2, 0, reference=True)
    titles = draw._titles(Table("Main", (measured, published), ()))
    assert titles["wikitext2_ppl"] == "wikitext2 ppl"


def test_the_divergence_is_measured_where_it_is_asked_for(source: Path) -> None:
    asked = run(source, "ratio=0.5", "eval.kl=sites", "eval.kl_windows=4", "whitening.top_k=0")
    assert execute(asked) is Outcome.complete
    found = metrics(run_folder(asked))
    whole = found["divergence"]["own"]  # type: ignore[index]
    assert whole["kl"] > 0
    sites = found["site_divergence"]["own"]  # type: ignore[index]
    plan = json.loads((run_folder(asked) / "plan.json").read_text())
    assert set(sites) == {name for name, site in plan["sites"].items() if not site["dense"]}
    for name, site in sites.items():
        assert 0 < site["kl"] < 3 * whole["kl"]
        assert site["predicted_kl"] == plan["sites"][name]["dropped_energy"] / 2
    record = read_record(run_folder(asked))
    assert record is not None
    text = asked.data.dataset.name
    assert record.value(other(f"{text}_kl")) == whole["kl"]
    inside = [0.5 <= s["predicted_kl"] / s["kl"] <= 2 for s in sites.values()]
    assert record.value(other(f"{text}_sites_within_two")) == sum(inside) / len(inside)


def test_a_target_is_recorded_with_the_ratio_it_took(source: Path) -> None:
    asked = run(source, "target_kl=0.01", "whitening.top_k=0", "allocation=spectral")
    assert execute(asked) is Outcome.complete
    folder = run_folder(asked)
    assert folder.name.startswith("io_svd[".replace("[", "_")) and "-kl0.01-" in folder.name
    found = metrics(folder)
    assert found["target_kl"] == 0.01
    assert 0 < found["predicted_kl"] <= 0.01  # type: ignore[operator]
    assert found["ratio"] == pytest.approx(found["ratio_achieved"], abs=0.02)
    record = read_record(folder)
    assert record is not None and record.ratio == found["ratio"]


def test_halves_are_whitened_and_scored_apart(source: Path) -> None:
    ranks = {}
    for halves in ("none", "same", "other"):
        asked = run(source, f"calibration.halves={halves}", "ratio=0.5")
        assert execute(asked) is Outcome.complete
        plan = json.loads((run_folder(asked) / "plan.json").read_text())
        ranks[halves] = {name: site["rank"] for name, site in plan["sites"].items()}
    assert ranks["same"] != ranks["other"]
    assert ranks["none"] != ranks["same"]
    first = run(source, "calibration.windows=8", "calibration.halves=same", "ratio=0.5")
    tokens, gradient = first.data.calibration.divided(torch.arange(8))
    assert (tokens.tolist(), gradient) == ([0, 1, 2, 3], None)
    other = run(source, "calibration.halves=other").data.calibration.divided(torch.arange(8))
    assert other[1] is not None and other[1].tolist() == [4, 5, 6, 7]


def test_predict_writes_its_curve_and_checks_it(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = predict.predict(overrides(source, "measure=0.8,0.45"))
    frame = pandas.read_csv(source / "results" / "tables" / "predict-small.csv")
    assert (source / "results" / "figures" / "predict-small.png").stat().st_size > 0
    assert frame.sort_values("ratio")["predicted_kl"].is_monotonic_decreasing
    measured = frame.dropna(subset=["kl"])
    assert measured["ratio"].tolist() == [0.45, 0.8]
    assert "0.4500" in page
    # The same as a run of its own.
    asked = run(source, *predict.METHOD, "ratio=0.8", "eval.kl=model")
    assert execute(asked) is Outcome.complete
    found = metrics(run_folder(asked))
    row = measured[measured["ratio"] == 0.8].iloc[0]
    assert row["kl"] == pytest.approx(found["divergence"]["own"]["kl"], rel=1e-4)  # type: ignore[index]
    assert row["predicted_kl"] == pytest.approx(found["predicted_kl"], rel=1e-4)
    assert "Outside a factor of 1.5 first" in page or "Within a factor of 1.5" in page


@pytest.mark.parametrize("wrong", ["measure=much", "measure=0.5,1.5"])
def test_predict_refuses_what_is_no_ratio(source: Path, wrong: str) -> None:
    with pytest.raises(IosvdError, match=r"is no list of ratios|outside \(0, 1\]"):
        predict.predict(overrides(source, wrong))


def test_an_impossible_budget_costs_no_statistics(source: Path) -> None:
    for options in (["ratio=0.01"], ["ratio=0.5", "min_rank_fraction=0.499999"]):
        asked = run(source, *options)
        assert execute(asked) is Outcome.failed
        failure = json.loads((run_folder(asked) / "failure.json").read_text())
        assert "is below" in failure["error"] and "\n" not in failure["error"]
    assert {kept.kind for kept in cache_of(asked).entries()} == {"tokens"}


def test_predict_without_measurements_says_so(source: Path) -> None:
    page = predict.predict(overrides(source))
    assert "Nothing was measured here; measure=0.8,0.6 checks the prediction." in page
    with pytest.raises(ConfigError, match="only the curvature of the whole vocabulary"):
        predict.predict(overrides(source, "whitening.top_k=5"))


def test_nothing_is_written_through_a_link_out_of_the_results(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = sentinels(source / "mine")
    before, asked = tree(mine), run(source, "method=svd")
    for link in (run_folder(asked), run_folder(asked).parent):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(mine)
        caplog.clear()
        assert execute(asked) is Outcome.failed
        (line,) = [line for line in caplog.messages if line.startswith("failed: ")]
        assert "is a link out of the results" in line and "remove the link" in line
        assert status_of(asked).state is State.failed
        assert tree(mine) == before
        link.unlink()
        if link == run_folder(asked):
            run_folder(asked).parent.rmdir()
    assert execute(asked) is Outcome.complete
    inside = run_folder(asked) / "checkpoint"
    inside.symlink_to(mine)
    again = run(source, "method=svd", "runtime.save_checkpoint=true")
    assert execute(again) is Outcome.complete and not inside.is_symlink()
    assert tree(mine) == before


def test_results_may_lie_behind_a_link(source: Path) -> None:
    (source / "large_disk").mkdir()
    (source / "results").mkdir()
    (source / "results" / "runs").symlink_to(source / "large_disk")
    assert execute(run(source, "method=svd")) is Outcome.complete


def test_a_checkpoint_is_made_of_a_complete_run_without_measuring_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("method=io_svd_plus", "ratio=0.5")
    measured, kept = run(source, *settings), run(source, *settings, "runtime.save_checkpoint=true")
    assert execute(measured) is Outcome.complete
    folder = run_folder(measured)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(iosvd.runs.execution, "measure", lambda *_, **__: pytest.fail("measured"))
    assert status_of(measured).state is State.done and status_of(kept).state is State.missing
    assert execute(kept) is Outcome.complete
    assert status_of(kept).state is State.done
    assert execute(kept) is Outcome.skipped
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    whole = source / "again"
    monkeypatch.undo()
    once = run(source, *settings, "runtime.save_checkpoint=true", f"runtime.results={whole}")
    assert execute(once) is Outcome.complete
    other = AutoModelForCausalLM.from_pretrained(run_folder(once) / "checkpoint")
    for (name, one), (_, two) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(one, two), name


def test_a_checkpoint_that_would_be_another_model_is_not_made(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = run(source, "method=svd", "ratio=0.5")
    assert execute(asked) is Outcome.complete
    path = run_folder(asked) / "plan.json"
    plan = json.loads(path.read_text())
    next(iter(plan["sites"].values()))["rank"] += 1
    path.write_text(json.dumps(plan))
    kept = run(source, "method=svd", "ratio=0.5", "runtime.save_checkpoint=true")
    assert execute(kept) is Outcome.failed
    assert "would not be stored as it was" in caplog.text and "runtime.force=true" in caplog.text
    assert status_of(kept).state is State.failed and status_of(asked).state is State.done


def test_a_new_measurement_leaves_no_checkpoint_of_an_old_one(source: Path) -> None:
    settings = ("method=svd", "ratio=0.5")
    kept = run(source, *settings, "runtime.save_checkpoint=true")
    assert execute(kept) is Outcome.complete
    assert has_checkpoint(run_folder(kept))
    assert execute(run(source, *settings, "runtime.force=true")) is Outcome.complete
    assert not has_checkpoint(run_folder(kept))


def test_what_is_to_be_measured_again_is_done_when_it_was(source: Path) -> None:
    asked = run(source, "method=svd", "runtime.force=true")
    assert execute(asked) is Outcome.complete
    before = Stamps.of([asked])
    assert status_of(asked).state is State.done
    assert before.status_of(asked).state is State.missing
    assert execute(asked) is Outcome.complete
    assert before.status_of(asked).state is State.done


needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else"
)
NOBODY = 65534
_READABLE = all(path.stat().st_mode & 0o005 == 0o005 for path in Path(sys.prefix).resolve().parents)
needs_readable = pytest.mark.skipif(
    not _READABLE, reason=f"other users cannot read the packages in {sys.prefix}"
)


@contextmanager
def somebody_else() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared_place() -> Iterator[Path]:
    """A folder that all users can read; pytest's own they cannot."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        small_source(place)
        for path in place.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield place


@needs_root
@needs_readable
@pytest.mark.parametrize("file", ["small/model.safetensors", "text/train.txt"])
def test_files_that_may_not_be_read_are_one_line(file: str, shared_place: Path) -> None:
    (shared_place / file).chmod(0o600)
    with somebody_else(), pytest.raises(IosvdError) as error:
        run_folder(run(shared_place))
    assert re.search(rf"cannot read .*{file}.*; ask its owner for permission", str(error.value))


@needs_root
@needs_readable
def test_colleagues_share_results_or_are_told_why_not(shared_place: Path) -> None:
    asked = run(shared_place, "method=svd")
    assert execute(asked) is Outcome.complete
    with somebody_else():
        assert execute(asked) is Outcome.skipped  # Its lock is a file that they may use too.
        other = run(shared_place, "method=svd", "ratio=0.5")
        with pytest.raises(StorageError, match=r"cannot write .*; ask its owner"), locked(other):
            pytest.fail("locked")
        assert execute(other) is Outcome.failed
    for folder in (shared_place / "results").rglob("*"):
        folder.chmod(0o777) if folder.is_dir() else None
    with somebody_else():
        assert execute(other) is Outcome.complete


LIMITED = """
import resource, sys
from iosvd.runs.config import compose_run, config_of
from iosvd.runs.execution import execute
import transformers.models.llama.modeling_llama
run = compose_run(sys.argv[1:])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**26
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(execute(run).value)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_limit_of_memory_that_is_hit_says_so(source: Path) -> None:
    big = ["calibration.windows=500", "runtime.batch_tokens=100000", "eval.windows=0"]
    command_line = [sys.executable, "-c", LIMITED, *overrides(source, "method=io_svd", *big)]
    found = subprocess.run(
        command_line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1]
    )
    assert "failed" in found.stdout, found.stdout + found.stderr
    (record,) = (source / "results" / "runs").rglob("failure.json")
    line = json.loads(record.read_text())["error"]
    assert line.startswith("out of memory (") and "lower runtime.batch_tokens" in line
