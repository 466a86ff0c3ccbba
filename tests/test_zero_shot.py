"""Zero-shot accuracy equals lm-eval called by hand, and a computation that does without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import shared

from iosvd.data.pydoc import pydoc_documents
from iosvd.errors import DataError
from iosvd.evaluation import pydoc_task
from iosvd.evaluation.pydoc_task import pydoc_items
from iosvd.evaluation.zero_shot import ZeroShot, load_tasks, zero_shot
from iosvd.models.loading import Dtype, Model, load_model, load_tokenizer

TINY = Model("tiny", embedded=True, dtype=Dtype.float32)
# Stock tasks by hand: where lm-eval keeps them, and the split of the local file.
BY_HAND = {
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "winogrande": ("winogrande/default.yaml", "validation"),
}


def test_agrees_with_lm_eval_called_by_hand_to_the_last_item(tmp_path: Path) -> None:
    """All items of two tasks, through lm-eval's command line and a YAML written here."""
    folder, items = shared("models", "stories260K"), shared("data", "tasks")
    model = Model("stories", path=str(folder), dtype=Dtype.float32)
    import lm_eval

    for name, (stock, split) in BY_HAND.items():
        path = Path(lm_eval.__file__).parent / "tasks" / stock
        files = f"{{test: {items / name / f'{split}.jsonl'}}}"
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {path}\ntask: {name}_by_hand\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {files}}}\n"
            "training_split: null\nvalidation_split: null\ntest_split: test\n"
        )
    tasks = ",".join(f"{name}_by_hand" for name in BY_HAND)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--batch_size", "32"]
    command += ["--include_path", str(tmp_path), "--tasks", tasks, "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]

    (results,) = (tmp_path / "out").rglob("results_*.json")
    by_hand = json.loads(results.read_text())
    ours = zero_shot(
        load_model(model),
        load_tokenizer(model),
        load_tasks(ZeroShot(list(BY_HAND), path=str(items))),
    )
    for name, (_, split) in BY_HAND.items():
        expected, score = by_hand["results"][f"{name}_by_hand"], ours.scores[name]
        assert score.acc == expected["acc,none"]
        assert score.acc_stderr == pytest.approx(expected["acc_stderr,none"])
        assert score.acc_norm == expected.get("acc_norm,none")
        assert score.items == len((items / name / f"{split}.jsonl").read_text().splitlines())
        (samples,) = (tmp_path / "out").rglob(f"samples_{name}_by_hand_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        assert ours.correct[name] == [row["acc"] == 1 for row in rows]
    accuracies = [score.acc for score in ours.scores.values()]
    assert ours.average == pytest.approx(sum(accuracies) / 2)


def test_the_embedded_task_agrees_with_a_plain_computation() -> None:
    """The answer is right where its own tokens are the likeliest of the four."""
    model, tokenizer = load_model(TINY), load_tokenizer(TINY)
    expected = []
    for item in pydoc_items()[:60]:
        scores = []
        context = tokenizer(item["context"], add_special_tokens=False)["input_ids"]
        for choice in item["choices"]:
            whole = tokenizer(f"{item['context']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(p[t - 1, whole[t]]) for t in range(len(context), len(whole))))
        expected.append(scores.index(max(scores)) == item["label"])
    tasks = load_tasks(ZeroShot([pydoc_task.NAME]))
    found = zero_shot(model, tokenizer, tasks, limit=60, batch_size=32)
    assert found.correct[pydoc_task.NAME] == expected
    assert found.scores[pydoc_task.NAME].items == 60
    assert found.scores[pydoc_task.NAME].acc == pytest.approx(sum(expected) / 60)
    singly = zero_shot(model, tokenizer, tasks, limit=60, batch_size=7)
    assert singly.correct == found.correct


def test_items_hold_the_true_continuation_and_three_that_are_nearly_it() -> None:
    items = pydoc_items()
    assert items == pydoc_items()
    assert len(items) == pydoc_task.ITEMS
    text = " ".join(" ".join(document.split()) for document in pydoc_documents("test"))
    for item in items:
        true = item["choices"][item["label"]]
        assert f"{item['context']} {true}" in text
        assert len(set(item["choices"])) == 4
        for choice in item["choices"]:
            different = [a != b for a, b in zip(choice.split(), true.split(), strict=True)]
            assert sum(different) == (choice != true)
    labels = [item["label"] for item in items]
    assert all(labels.count(label) > 30 for label in range(4))


def test_no_tasks_measure_nothing() -> None:
    found = zero_shot(load_model(TINY), load_tokenizer(TINY), load_tasks(ZeroShot()))
    assert (found.scores, found.average) == ({}, None)


def test_a_single_item_has_no_standard_error() -> None:
    tasks = load_tasks(ZeroShot([pydoc_task.NAME]))
    found = zero_shot(load_model(TINY), load_tokenizer(TINY), tasks, limit=1)
    score = found.scores[pydoc_task.NAME]
    assert (score.items, score.acc_stderr) == (1, None) and score.acc in (0, 1)


def test_tasks_without_an_accuracy_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no single task ai2_arc"):  # A group of two.
        load_tasks(ZeroShot(["ai2_arc"]))
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "test.jsonl").write_text('{"page": "Text."}\n')
    with pytest.raises(DataError, match="wikitext is no multiple-choice task"):
        load_tasks(ZeroShot(["wikitext"], path=str(tmp_path)))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    def load(task: str) -> None:
        load_tasks(ZeroShot([task], path=str(tmp_path)))

    with pytest.raises(DataError, match=r"arc_easy is not a folder.*eval\.zero_shot\.path"):
        load("arc_easy")
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"arc_easy has no test\.jsonl or \.parquet, the split"):
        load("arc_easy")
    with pytest.raises(DataError, match="lm-eval has no single task arc_eazy"):
        load_tasks(ZeroShot(["arc_eazy"]))
    (tmp_path / "arc_easy" / "test.jsonl").write_text("{not json\n")
    with pytest.raises(DataError, match=r"cannot load the items of arc_easy from .*FOLDER"):
        load("arc_easy")
