"""Exactly n windows of exactly seq_len tokens, from every kind of source; and clear refusals."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from conftest import shared
from transformers import PreTrainedTokenizerBase

from experiments.mix import mix
from iosvd.data.pydoc import pydoc_documents, split_of
from iosvd.data.texts import Dataset, Split, read_documents
from iosvd.data.windows import (
    calibration_windows,
    check_vocabulary,
    document_windows,
    evaluation_windows,
    warn_if_few,
)
from iosvd.errors import ConfigError, DataError, StorageError
from iosvd.models.loading import Model, load_tokenizer
from iosvd.runs.config import compose_run
from iosvd.windows import Windows

DOCUMENTS = ["One day a cat sat.", "", "Then it ran away, and nobody\nsaw it again."]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(Model("tiny", embedded=True))


def write(folder: Path, suffix: str, split: str = "train", field: str = "text") -> Dataset:
    path = folder / f"{split}.{suffix}"
    if suffix == "txt":
        path.write_text("\n".join(DOCUMENTS) + "\n")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({field: text}) + "\n" for text in DOCUMENTS))
    else:
        pandas.DataFrame({field: DOCUMENTS}).to_parquet(path)
    return Dataset("written", path=str(folder))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_documents_are_read_as_they_were_written(suffix: str, tmp_path: Path) -> None:
    assert read_documents(write(tmp_path, suffix), Split("train")) == DOCUMENTS


def test_a_mixture_is_equal_parts_of_texts_as_each_is_joined(tmp_path: Path) -> None:
    ptb, c4 = ("no it was", "n't black"), ("A long text.", "And more.")
    for name, field, rows in (("ptb", "sentence", ptb), ("c4", "text", c4)):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps({field: row}) + "\n" for row in rows)
        (tmp_path / name / "train.jsonl").write_text(lines)
    into = tmp_path / "mixed"
    said = mix([f"data={tmp_path}", "texts=ptb,c4", f"into={into}"])
    assert said == f"{into / 'train.jsonl'}: 19 characters each of ptb,c4"
    mixed = compose_run(["dataset=mixed", f"dataset.path={into}"]).data.text
    found = read_documents(mixed, mixed.calibration)
    assert found == ["no it was n't black", "A long text. And mo"]
    for wrong in (["texts=ptb"], [f"into={into}"], ["texts=ptb", f"into={into}", "more=1"]):
        with pytest.raises(ConfigError, match="give texts=NAME,NAME and into=FOLDER"):
            mix(wrong)


def test_txt_has_a_document_a_line(tmp_path: Path) -> None:
    lines = [line for text in DOCUMENTS for line in text.split("\n")]
    dataset = write(tmp_path, "txt")
    assert read_documents(dataset, Split("train")) == lines
    assert read_documents(dataset, Split("train", max_documents=1)) == lines[:1]


def test_local_wikitext_gives_the_rows_of_the_hub() -> None:
    """The hub's rows end in a newline where the line has text and are empty where it is blank."""
    path = shared("data", "text", "wikitext2")
    dataset = Dataset("wikitext2", path=str(path), keep_line_ends=True)
    rows = read_documents(dataset, Split("test"))
    assert len(rows) == 4358  # The size of the official test split.
    assert rows[:2] == ["", " = Robert Boulter = \n"]
    # Rows without text are a space and a newline in the file.
    text = (path / "test.txt").read_text()
    assert sum(map(len, rows)) == len("".join(x for x in text.splitlines(True) if x.strip()))


def test_numbers_in_jsonl_stay_text(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "007"}\n{"text": "1e5"}\n')
    dataset = Dataset("numbers", path=str(tmp_path))
    assert read_documents(dataset, Split("train")) == ["007", "1e5"]


@pytest.mark.parametrize(
    ("change", "split", "error", "message"),
    [
        ({"path": "/nowhere"}, "train", DataError, "not a folder"),
        ({}, "test", DataError, r"no test in txt.*found: train\.jsonl"),
        ({"text_field": "body"}, "train", DataError, r"no field 'body' \(fields: text\)"),
        ({"path": None}, "train", ConfigError, "no source"),
    ],
)
def test_a_missing_source_says_what_to_set(
    change: dict[str, str], split: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    dataset = replace(write(tmp_path, "jsonl"), **change)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        read_documents(dataset, Split(split))


def test_damaged_and_empty_files_are_one_line(tmp_path: Path) -> None:
    dataset = Dataset("damaged", path=str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    (tmp_path / "validation.txt").write_text("\n\n")
    for split in ("train", "test", "validation"):
        with pytest.raises(DataError, match=split) as error:
            read_documents(dataset, Split(split))
        assert "\n" not in str(error.value)


def test_text_that_is_no_utf8_and_rows_without_text_are_one_line(tmp_path: Path) -> None:
    dataset = Dataset("damaged", path=str(tmp_path))
    (tmp_path / "train.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(DataError, match=r"train\.txt is not UTF-8 \(byte 2\)"):
        read_documents(dataset, Split("train"))
    with pytest.raises(DataError, match=r"test\.jsonl: row 2 has a null in the field 'text'"):
        read_documents(dataset, Split("test"))


def test_an_unreachable_hub_says_which_option_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    dataset = Dataset("c4", hub_id="allenai/c4")
    with pytest.raises(DataError, match=r"cannot load allenai/c4.*dataset\.path=FOLDER") as error:
        read_documents(dataset, Split("train"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("windows", [1, 7, 100])
@pytest.mark.parametrize("length", [2, 33])
def test_spans_are_exactly_as_asked_and_seeded(
    windows: int, length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    pydoc = Dataset("pydoc", builtin=True, calibration=Split("validation"))
    one, again, other = (
        calibration_windows(tokenizer, pydoc, windows, length, seed) for seed in (0, 0, 1)
    )
    assert one.shape == (windows, length)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    text = "\n\n".join(pydoc_documents("validation"))
    whole = "," + ",".join(map(str, tokenizer(text, add_special_tokens=False)["input_ids"])) + ","
    for row in one[:5]:
        assert "," + ",".join(map(str, row.tolist())) + "," in whole


def test_document_windows_start_with_bos_and_never_cross(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = ["a b c d e f g h i j", "tiny", "1 2 3 4 5 6 7 8 9"]
    found = document_windows(tokenizer, texts, 4).tolist()
    expected = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        expected += [ids[i : i + 4] for i in range(0, len(ids) - 3, 4)]
    assert found == expected
    assert sum(row[0] == tokenizer.bos_token_id for row in found) >= 2


def test_document_calibration_takes_each_window_at_most_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    dataset = replace(write(tmp_path, "jsonl"), document_windows=True)
    everything = document_windows(tokenizer, DOCUMENTS, 3).tolist()
    chosen = calibration_windows(tokenizer, dataset, len(everything), 3, seed=5).tolist()
    assert sorted(chosen) == sorted(everything)


def test_evaluation_is_the_whole_text_in_order(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    dataset = replace(write(tmp_path, "jsonl", "test"), join=" ")
    ids = tokenizer(" ".join(DOCUMENTS), add_special_tokens=False)["input_ids"]
    found = evaluation_windows(tokenizer, dataset, 6)
    assert found.flatten().tolist() == ids[: len(ids) // 6 * 6]
    assert torch.equal(evaluation_windows(tokenizer, dataset, 6, windows=2), found[:2])


def test_too_short_a_text_says_how_much_there_is(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    spans = write(tmp_path, "jsonl")
    stories = replace(spans, document_windows=True)
    evaluation = replace(spans, evaluation=Split("train"))
    for call in (
        lambda: calibration_windows(tokenizer, spans, 1, 500, 0),
        lambda: calibration_windows(tokenizer, spans, 500, 8, 0),
        lambda: calibration_windows(tokenizer, stories, 500, 4, 0),
        lambda: evaluation_windows(tokenizer, evaluation, 500),
        lambda: evaluation_windows(tokenizer, evaluation, 8, windows=100),
    ):
        with pytest.raises(
            DataError, match=r"written has \d+ windows of \d+ tokens, \d+ are asked"
        ):
            call()


def test_overlapping_windows_and_few_tokens_are_warned_of(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        calibration_windows(tokenizer, write(tmp_path, "jsonl"), 10, 16, 0)
        warn_if_few(Windows(torch.zeros(4, 256, dtype=torch.long)), {"down": 4096, "up": 128})
    assert "overlap" in caplog.messages[0]
    assert "1,024 tokens for inputs of width 4,096 (down); at least 16,384" in caplog.messages[1]
    caplog.clear()
    warn_if_few(Windows(torch.zeros(4, 256, dtype=torch.long)), {"down": 256})
    assert not caplog.messages


def test_a_foreign_tokenizer_is_noticed() -> None:
    check_vocabulary(torch.tensor([[0, 30]]), 31)
    with pytest.raises(DataError, match="token 31 is outside the model's vocabulary of 31"):
        check_vocabulary(torch.tensor([[0, 31]]), 31)


def test_pydoc_splits_are_real_text_and_share_no_module() -> None:
    splits = {split: pydoc_documents(split) for split in ("train", "validation", "test")}
    for texts in splits.values():
        assert sum(map(len, texts)) > 50_000
    assert not set(splits["train"]) & set(splits["test"])
    assert not set(splits["train"]) & set(splits["validation"])
    assert split_of("datetime") == split_of("_pydatetime")
    assert split_of("io") == split_of("_pyio")


@pytest.mark.parametrize(
    ("value", "kind"),
    [([{"role": "user"}], "list"), ({"a": "b"}, "table"), (3, "number"), (None, "null")],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_field_that_is_no_text_is_an_error(
    value: object, kind: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"train.{suffix}"
    rows = [{"text": value}, {"text": value}]
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pandas.DataFrame(rows).to_parquet(file)
    with pytest.raises(DataError, match=rf"row 1 has a {kind} in the field 'text', not a text"):
        read_documents(Dataset("local", path=str(tmp_path)), Split("train"))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_byte_order_mark_is_no_text(suffix: str, tmp_path: Path) -> None:
    content = "Once\n" if suffix == "txt" else '{"text": "Once"}\n'
    (tmp_path / f"train.{suffix}").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_documents(Dataset("local", path=str(tmp_path)), Split("train")) == ["Once"]


def test_other_fields_are_not_converted(tmp_path: Path) -> None:
    rows = [{"id": 2**70, "when": "2020-99-99", "text": "one"}, {"more": None, "text": "two"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    assert read_documents(Dataset("local", path=str(tmp_path)), Split("train")) == ["one", "two"]
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n["two"]\n')
    with pytest.raises(DataError, match=r"line 2 of .*no field 'text' .*but a list"):
        read_documents(Dataset("local", path=str(tmp_path)), Split("train"))


def test_half_a_character_and_deep_nesting_end_no_run(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one \\ud83d"}\n')
    dataset = Dataset("local", path=str(tmp_path))
    assert read_documents(dataset, Split("train")) == ["one ?"]
    (tmp_path / "train.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match="line 1 of"):
        read_documents(dataset, Split("train"))


def test_of_two_files_of_one_split_the_one_that_is_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.txt").write_text("plain\n")
    (tmp_path / "train.jsonl").write_text('{"text": "json"}\n')
    assert read_documents(Dataset("local", path=str(tmp_path)), Split("train")) == ["plain"]
    assert "train.txt is read, and train.jsonl beside it is not" in caplog.text


def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "train.txt").write_text(pointer)
    with pytest.raises(StorageError, match=r"train\.txt is a pointer of Git LFS.*git lfs pull"):
        read_documents(Dataset("local", path=str(tmp_path)), Split("train"))
