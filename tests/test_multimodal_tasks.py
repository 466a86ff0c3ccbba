"""lm-eval's tasks with images: a stock task of MMMU on items of its form, which are drawn here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from experiments.train_tiny_vlm import Recipe, build, processor_of
from iosvd.data.drawn import drawn_item
from iosvd.data.items import LETTERS
from iosvd.errors import DataError
from iosvd.evaluation.zero_shot import ZeroShot, load_tasks, zero_shot

TASK = "mmmu_val_art"
ITEMS = [drawn_item("test", number) for number in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMMU's columns; the image has its place in the question."""
    found = tmp_path_factory.mktemp("tasks")
    (found / TASK).mkdir()
    rows = [
        {
            "id": item.name,
            "question": f"<image 1> {item.question}",
            "options": str(list(item.choices)),
            "image_1": item.image,
            "question_type": "multiple-choice",
            "answer": LETTERS[item.answer],
        }
        for item in ITEMS
    ]
    columns = {name: Image() if name == "image_1" else Value("string") for name in rows[0]}
    data = Dataset.from_list(rows, features=Features(columns))
    data.to_parquet(found / TASK / "validation.parquet")
    return found


@pytest.fixture
def processor() -> ProcessorMixin:
    return processor_of()


@pytest.fixture
def model(processor: Any) -> PreTrainedModel:
    return build(Recipe(layers=1, eye_layers=1), processor).eval()


def answering(model: PreTrainedModel, processor: Any, shift: int) -> None:
    """Let a model know the answer by the pixels it is shown, or name the one so far behind it."""
    pixels = [processor.image_processor(images=[[i.image]], return_tensors="pt") for i in ITEMS]

    def generate(input_ids: Tensor, pixel_values: Tensor, **options: Any) -> Tensor:
        answers = []
        for text, shown in zip(input_ids, pixel_values, strict=True):
            asked = processor.tokenizer.decode(text)
            (item,) = (
                item
                for item, its in zip(ITEMS, pixels, strict=True)
                if torch.equal(its["pixel_values"][0], shown)
            )
            assert asked.count("<image>") == processor.image_seq_len
            assert all(word in asked for word in item.question.rstrip("?").split())
            answers.append(LETTERS[(item.answer + shift) % 4])
        tokens = torch.tensor(processor.tokenizer.convert_tokens_to_ids(answers))
        return torch.cat([input_ids, tokens[:, None]], 1)

    model.generate = generate  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(("shift", "accuracy"), [(0, 1.0), (1, 0.0)])
def test_an_oracle_is_right_and_its_neighbour_is_wrong(
    folder: Path, model: PreTrainedModel, processor: Any, shift: int, accuracy: float
) -> None:
    model.config.text_config.max_position_embeddings = 1024
    answering(model, processor, shift)
    tasks = load_tasks(ZeroShot([TASK], path=str(folder)))
    found = zero_shot(model, processor.tokenizer, tasks, batch_size=2, processor=processor)
    assert found.scores[TASK].acc == accuracy
    assert found.scores[TASK].items == len(ITEMS)
    assert found.correct[TASK] == [accuracy == 1] * len(ITEMS)


def test_an_answer_needs_room(folder: Path, model: PreTrainedModel, processor: Any) -> None:
    tasks = load_tasks(ZeroShot([TASK], path=str(folder)))
    with pytest.raises(DataError, match=r"up to 512 tokens, which do not fit the model's context"):
        zero_shot(model, processor.tokenizer, tasks, processor=processor)
    model.config.text_config.max_position_embeddings = 530
    with pytest.raises(DataError, match=r"has \d+ tokens, and the context leaves 18"):
        zero_shot(model, processor.tokenizer, tasks, processor=processor)
