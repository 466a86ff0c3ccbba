"""Runs of a model that sees, from its folder to its record and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import iosvd.runs.evaluation
from experiments import render
from experiments.train_tiny_vlm import Recipe, build, processor_of
from iosvd.data.drawn import drawn_item
from iosvd.errors import ModelError
from iosvd.metric import accuracy_on, other
from iosvd.models.attention_form import JOINT
from iosvd.runs.config import compose_run
from iosvd.runs.execution import Outcome, execute
from iosvd.runs.fingerprints import digest
from iosvd.runs.records import FAILURE, read_metrics, read_plan, read_record, run_folder
from iosvd.runs.run import Run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model that was not trained, and its processor."""
    folder = tmp_path_factory.mktemp("seeing")
    processor = processor_of()
    torch.manual_seed(0)
    build(Recipe(layers=2, eye_layers=1), processor).eval().save_pretrained(folder / "small")
    processor.save_pretrained(folder / "small")
    return folder


def overrides(source: Path, *options: str) -> list[str]:
    return [
        *("model=local", f"model.path={source / 'small'}", "dataset=drawn", "eval=drawn"),
        *("calibration.windows=24", "eval.questions.drawn.evaluation.max_documents=30"),
        *(f"runtime.results={source / 'results'}", "ratio=0.6", *options),
    ]


def run(source: Path, *options: str) -> Run:
    return compose_run(overrides(source, *options))


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_run_records_answers_and_all_three_ratios(source: Path) -> None:
    asked = run(source, "method=io_svd", "runtime.save_checkpoint=true")
    assert execute(asked) is Outcome.complete
    metrics, folder = read_metrics(run_folder(asked)), run_folder(asked)
    (found,) = metrics["questions"].values()
    answered = json.loads((folder / "answers.json").read_text())["drawn"]
    assert found["items"] == 30 and found["acc"] == sum(answered) / 30
    assert set(found["by_category"]) == {drawn_item("test", i).category for i in range(30)}
    record = read_record(folder)
    assert record is not None and record.value(accuracy_on("drawn")) == found["acc"]
    assert record.value(other("drawn_unanswered")) == found["unanswered"]
    plan = read_plan(folder)["sites"]
    cached = {n: s for n, s in plan.items() if n.endswith(("k_proj", "v_proj"))}
    kept = sum(s["out_features"] if s["dense"] else s["rank"] for s in cached.values())
    assert metrics["cache_ratio"] == kept / sum(s["out_features"] for s in cached.values())
    dense = AutoModelForImageTextToText.from_pretrained(source / "small")
    again = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    assert metrics["whole_ratio"] == pytest.approx(parameters(again) / parameters(dense))
    assert AutoProcessor.from_pretrained(folder / "checkpoint").chat_template


def test_a_joint_latent_is_the_cache_of_keys_and_values(source: Path) -> None:
    asked = run(source, "method=qsvd")
    assert execute(asked) is Outcome.complete
    plan, metrics = read_plan(run_folder(asked))["sites"], read_metrics(run_folder(asked))
    assert all(name.endswith(JOINT) for name in plan)
    keys = 2 * Recipe().key_value_heads * Recipe().width // Recipe().heads
    kept = [keys if s["dense"] else min(keys, s["rank"]) for s in plan.values()]
    assert metrics["cache_ratio"] == pytest.approx(sum(kept) / (keys * len(plan)))
    assert metrics["ratio_achieved"] <= 0.6


def test_the_table_shows_answers_and_what_is_kept(
    source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = ["experiment=vlm", "method=svd,svd_llm", "model.name=seeing"]
    for method in ("svd", "svd_llm"):
        assert execute(run(source, f"method={method}", "model.name=seeing")) is Outcome.complete
    render.render(overrides(source, *chosen))
    printed = capfd.readouterr().out
    assert "Runs found: 2 of 3." in printed
    head = next(line for line in printed.splitlines() if line.startswith("| "))
    for column in (
        "drawn ↑",
        "drawn, likeliest ↑",
        "drawn, unanswered",
        "R2, cache",
        "whole model",
    ):
        assert column in head
    assert "published, smolvlm_2b: scienceqa" in head
    assert "accuracy of generated answers" in printed and "R2 = 50 %" in printed


def test_the_same_questions_without_images_calibrate_otherwise(source: Path) -> None:
    with_images, without = (
        run(source, "method=svd_llm"),
        run(source, "method=svd_llm", "dataset=drawn_text"),
    )
    assert digest(with_images) != digest(without)
    assert execute(without) is Outcome.complete
    assert read_metrics(run_folder(without))["questions"]["drawn"]["items"] == 30


def test_questions_that_were_asked_are_not_asked_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies between two sets of questions goes on with the second."""
    second = (
        "+eval.questions.more={_target_: iosvd.data.visual.VisualDataset, name: more, drawn: true"
    )
    asked = run(
        source, "method=svd", f"{second}, evaluation: {{name: validation, max_documents: 20}}}}"
    )
    plain, calls = iosvd.runs.evaluation.answers, []

    def dying(*given: Any) -> Any:
        calls.append(len(given[2]))
        if len(calls) == 2:
            raise ModelError("died")
        return plain(*given)

    monkeypatch.setattr(iosvd.runs.evaluation, "answers", dying)
    assert execute(asked) is Outcome.failed
    assert execute(asked) is Outcome.complete
    assert calls == [30, 20, 20]


def test_a_model_that_reads_text_alone_fails_in_one_line(source: Path) -> None:
    asked = run(source, "model=tiny", "model.path=null", "method=svd")
    assert execute(asked) is Outcome.failed
    error = json.loads((run_folder(asked) / FAILURE).read_text())["error"]
    assert error.startswith("tiny reads text alone, and questions about images are asked")
    assert "\n" not in error.strip()
