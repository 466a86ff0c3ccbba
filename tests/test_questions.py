"""Questions about images: drawn and read, put by a processor's template, answered and scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Idefics3Processor, PreTrainedModel

from experiments.train_tiny_vlm import Recipe, build, processor_of
from iosvd.data.drawn import CELL, COLOURS, NUMBERS, PLACES, drawn_item, things_in
from iosvd.data.image_text import Counted, Prompt, Reply, image_tokens, image_windows
from iosvd.data.items import LETTERS, Item
from iosvd.data.texts import Split
from iosvd.data.visual import Fields, VisualDataset, chosen_items, read_items
from iosvd.errors import ConfigError, DataError, ModelError
from iosvd.evaluation.letters import chosen
from iosvd.evaluation.questions import Answers, answers, score
from iosvd.runs.config import compose_run
from iosvd.runs.reader import Reader

PROMPT = Prompt()


@pytest.fixture(scope="module")
def processor() -> Idefics3Processor:
    return processor_of()


@pytest.fixture(scope="module")
def model(processor: Idefics3Processor) -> PreTrainedModel:
    torch.manual_seed(0)
    return build(Recipe(layers=2, eye_layers=1), processor).eval()


def items(number: int, split: str = "test") -> list[Item]:
    return [drawn_item(split, i) for i in range(number)]


def test_items_are_functions_of_split_and_number() -> None:
    one, again, other = drawn_item("train", 5), drawn_item("train", 5), drawn_item("test", 5)
    assert replace(one, load=again.load) == again
    assert one.image.tobytes() == again.image.tobytes() != other.image.tobytes()


def filled_cells(item: Item) -> dict[int, np.ndarray]:
    """Return the mean colour of the bright pixels of cells that have any, from the image alone."""
    pixels = np.asarray(item.image).astype(int)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    found = {}
    for place in range(9):
        row, column = (CELL * i for i in divmod(place, 3))
        cell = pixels[row : row + CELL, column : column + CELL].reshape(-1, 3)
        apart = cell[np.abs(cell - ground).max(1) > 60]
        if len(apart) >= 10:
            found[place] = apart.mean(0)
    return found


def test_answers_are_what_the_image_shows() -> None:
    seen = set()
    for item in items(300):
        cells, right = filled_cells(item), item.choices[item.answer]
        assert len(item.choices) == len(set(item.choices)) == 4
        if item.category == "number":
            assert len(cells) == NUMBERS.index(right) + 1
            seen.add("number")
        if len(cells) == 1 and item.category == "place":
            assert PLACES[next(iter(cells))] == right
            seen.add("place")
        if len(cells) == 1 and item.category == "colour":
            distance = {n: np.abs(next(iter(cells.values())) - c).sum() for n, c in COLOURS.items()}
            assert min(distance, key=distance.__getitem__) == right
            seen.add("colour")
    assert seen == {"number", "place", "colour"}
    for number in range(20):
        places = {thing.place for thing in things_in("test", number)}
        assert places == set(filled_cells(drawn_item("test", number)))


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("B.", 1),
        (" b", None),
        ("The answer is C, of course", 2),
        ("(D)", 3),
        ("A or B", 0),  # The first of two.
        ("A green one is on the left", 1),  # An article.
        ("B means green", 1),
        ("A is right", 0),
        ("E", None),  # No such choice.
        ("the red one", 0),
        ("top left", 3),
        ("red and green", None),  # Two texts.
        ("redder", None),
        ("I do not know", None),
        ("It's blue", 2),
        ("", None),
    ],
)
def test_letters_and_texts_name_choices(answer: str, index: int | None) -> None:
    assert chosen(answer, ["red", "green", "blue", "top left"]) == index


def test_the_longer_of_two_choices_that_hold_each_other_is_meant() -> None:
    assert chosen("It is 3.5 m", ["3", "3.5", "4"]) == 1
    assert chosen("3", ["3", "3.5", "4"]) == 0
    assert chosen("I think it is nine", [str(i) for i in range(8)] + ["nine"]) == 8


def test_choices_without_letters_are_named_by_their_texts() -> None:
    assert chosen("A red one", ["red", "green"], lettered=False) == 0
    assert chosen("A", ["red", "green"], lettered=False) is None


def test_prompts_are_smolvlms(processor: Idefics3Processor) -> None:
    item = replace(drawn_item("test", 0), hint="Look.", question="Which?", choices=("x", "y"))
    assert PROMPT.text(processor, item) == (
        "<|im_start|>User:<image>Look.\nWhich?\nChoices:\nA. x\nB. y\nAnswer with the letter."
        "<end_of_utterance>\nAssistant: Answer:"
    )
    assert OPEN.text(processor, item) == (
        "<|im_start|>User:<image>Look.\nWhich?<end_of_utterance>\nAssistant: Answer:"
    )
    assert (PROMPT.reply_of(item, 1), OPEN.reply_of(item, 1)) == ("B", "y")
    with pytest.raises(ConfigError, match="reply=letter needs choices"):
        Prompt(choices="")


@pytest.mark.parametrize("counted", list(Counted))
def test_windows_count_answers_or_all_text(
    processor: Idefics3Processor, model: PreTrainedModel, counted: Counted
) -> None:
    some = items(9)
    windows = image_windows(processor, some, PROMPT, counted)
    assert windows.counted is not None
    special = set(image_tokens(processor))
    for row, item in enumerate(some):
        counts = windows.counted[row]
        following = windows.tokens[row].roll(-1)[counts].tolist()
        assert not special & set(following)
        end = [
            processor.tokenizer.convert_tokens_to_ids(LETTERS[item.answer]),
            processor.tokenizer.eos_token_id,
        ]
        assert following[-2:] == end
        if counted is Counted.answer:
            assert following == end
        else:
            assert len(following) > 20
    assert windows.logits(model).shape[:2] == windows.tokens.shape


def test_the_same_texts_without_images(processor: Idefics3Processor) -> None:
    some = items(3)
    windows = image_windows(processor, some, PROMPT, Counted.answer, images=False)
    assert not set(image_tokens(processor)) & set(windows.tokens.unique().tolist())
    assert all(not one for one in windows.beside)
    assert int(windows.positions.sum()) == 6


def test_the_likeliest_letter_is_that_of_a_forward_pass(
    processor: Idefics3Processor, model: PreTrainedModel
) -> None:
    """And answers do not depend on which others are asked beside."""
    some = items(12)
    found = answers(model, processor, some, PROMPT, batch_size=5)
    assert found == answers(model, processor, some, PROMPT, batch_size=1)
    letters = processor.tokenizer.convert_tokens_to_ids(list("ABCD"))
    for item, likeliest in zip(some, found.likeliest, strict=True):
        text = PROMPT.text(processor, item)
        batch = processor(text=[text], images=[[item.image]], return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[0, -1]
        assert likeliest == int(logits[letters].argmax())


OPEN = Prompt(choices="", request="", reply=Reply.text)


def test_the_likeliest_text_is_that_of_forward_passes(
    processor: Idefics3Processor, model: PreTrainedModel
) -> None:
    """Each choice alone behind the prompt, with the end of the turn."""
    some = items(12)
    found = answers(model, processor, some, OPEN, batch_size=5)
    assert found.likeliest == answers(model, processor, some, OPEN, batch_size=1).likeliest
    end = processor.tokenizer.eos_token
    for item, likeliest in zip(some, found.likeliest, strict=True):
        scores = []
        for choice in item.choices:
            text = f"{OPEN.text(processor, item)} {choice}{end}"
            batch = processor(text=[text], images=[[item.image]], return_tensors="pt")
            ids = batch["input_ids"][0]
            count = len(processor.tokenizer(f"{choice}{end}")["input_ids"])
            with torch.no_grad():
                kept = model(**batch).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])
            scores.append(float(kept[-count:].sum()))
        assert likeliest == max(range(4), key=scores.__getitem__)


def test_a_random_model_answers_by_chance(
    processor: Idefics3Processor, model: PreTrainedModel
) -> None:
    some = items(400)
    found = score(some, answers(model, processor, some, PROMPT))
    assert found.chance == 0.25 and found.items == 400
    assert abs(found.acc_likeliest - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


@dataclass
class Oracle:
    """A model that is given the answers."""

    processor: Idefics3Processor
    texts: list[str]
    config: Any = field(default_factory=lambda: SimpleNamespace(get_text_config=SimpleNamespace))
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(self.processor.tokenizer)))

    def generate(self, input_ids: Tensor, **_: Any) -> Any:
        told, self.texts = self.texts[: len(input_ids)], self.texts[len(input_ids) :]
        new = self.processor.tokenizer(told, padding=True, return_tensors="pt")["input_ids"]
        logits = torch.zeros(len(new), len(self.processor.tokenizer))
        logits[range(len(new)), new[:, 0]] = 1
        return SimpleNamespace(sequences=torch.cat([input_ids, new], 1), logits=[logits])


def asked(processor: Idefics3Processor, some: Sequence[Item], texts: list[str]) -> Answers:
    return answers(Oracle(processor, texts), processor, some, PROMPT, 16)  # type: ignore[arg-type]


def test_an_oracle_is_always_right_and_silence_always_wrong(processor: Idefics3Processor) -> None:
    some = items(50)
    right = score(some, asked(processor, some, [LETTERS[item.answer] for item in some]))
    assert right.acc == right.acc_likeliest == 1 and right.unanswered == 0
    assert set(right.by_category.values()) == {1.0}
    named = score(some, asked(processor, some, [item.choices[item.answer] for item in some]))
    assert named.acc == 1
    spoken = [item.choices[item.answer] for item in some]
    said = answers(Oracle(processor, spoken), processor, some, OPEN, 16)  # type: ignore[arg-type]
    assert score(some, said).acc == 1
    silent = score(some, asked(processor, some, ["Where"] * 50))
    assert silent.acc == 0 and silent.unanswered == 50


def folder(tmp_path: Path, *rows: dict[str, Any]) -> VisualDataset:
    """Write items of a local data set; every image is a real file unless a row names another."""
    drawn_item("test", 0).image.save(tmp_path / "one.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "one.png").read_bytes()[:200])
    (tmp_path / "words.png").write_text("no image")
    if any(row.get("image") == "large.png" for row in rows):
        Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    whole = {"image": "one.png", "question": "Which?", "choices": ["x", "y"], "answer": 1}
    lines = [json.dumps({**whole, **row}) for row in rows]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return VisualDataset("local", path=str(tmp_path))


def test_a_folder_is_read(tmp_path: Path) -> None:
    data = folder(
        tmp_path, {"hint": "H", "category": "c"}, {"image": None}, {"answer": "A"}, {"hint": None}
    )
    found = read_items(data, Split("test"))
    assert [(i.answer, i.hint, i.category) for i in found] == [
        (1, "H", "c"),
        (0, "", ""),
        (1, "", ""),
    ]
    assert found[0].image.size == (48, 48)
    assert len(read_items(data, Split("test", max_documents=2))) == 2
    fields = Fields(choices=["first", "second", "third"])
    data = replace(folder(tmp_path, {"first": "p", "second": "q", "third": None}), fields=fields)
    assert read_items(data, Split("test"))[0].choices == ("p", "q")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "none.png"}, r"image of item 1 of .*\(none\.png\) is missing"),
        ({"image": "cut.png"}, r"image of item 1 of .*\(cut\.png\) is damaged"),
        ({"image": "words.png"}, r"image of item 1 of .*\(words\.png\) is of an unknown format"),
        ({"image": ["one.png", "one.png"]}, "item 1 of .* has 2 images; only items of one"),
        ({"answer": None}, "item 1 of .* has no answer"),
        ({"answer": 2}, "item 1 of .* has the answer 2"),
        ({"answer": "C"}, "item 1 of .* has the answer 'C'"),
        ({"answer": True}, "item 1 of .* has the answer True"),
        ({"question": None}, "item 1 of .* has no question"),
        ({"choices": ["x"]}, "item 1 of .* needs 2 to 10 choices"),
        ({"choices": "xy"}, "item 1 of .* needs 2 to 10 choices"),
        ({"image": "large.png"}, r"image of item 1 of .*\(large\.png\) is too large"),
    ],
)
def test_damaged_items_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_items(folder(tmp_path, row), Split("test"))
    assert "\n" not in str(caught.value)


def test_rows_and_fields_are_read_as_texts_are(tmp_path: Path) -> None:
    data = folder(tmp_path, {"category": 0, "question": "a\u2028b"}, {"kind": "video"})
    lines = (tmp_path / "test.jsonl").read_text(encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(f"\ufeff{lines}", encoding="utf-8")
    found = read_items(data, Split("test"))
    assert [(item.category, item.question) for item in found] == [("0", "a\u2028b"), ("", "Which?")]
    only = replace(data, only={"kind": "video"})
    assert [item.category for item in read_items(only, Split("test"))] == [""]
    (tmp_path / "test.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_items(data, Split("test"))
    with pytest.raises(ConfigError, match=r"fields\.choices is empty"):
        Fields(choices=[])


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    data = folder(tmp_path, {})
    with pytest.raises(DataError, match=r"has no train\.jsonl"):
        read_items(data, Split("train"))
    with pytest.raises(DataError, match="has 1 questions with an image, 2 are asked for"):
        chosen_items(replace(data, calibration=Split("test")), 2, seed=0)
    with pytest.raises(ConfigError, match="no source"):
        read_items(VisualDataset("none"), Split("test"))
    for read in (lambda d: read_items(d, d.calibration), lambda d: chosen_items(d, 3, 0)):
        with pytest.raises(DataError, match="no split dev; there are train, validation, test"):
            read(VisualDataset("drawn", drawn=True, calibration=Split("dev")))
    (tmp_path / "test.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"line 1 of .* is no JSON"):
        read_items(data, Split("test"))


def test_seeds_choose_other_items(tmp_path: Path) -> None:
    drawn = VisualDataset("drawn", drawn=True)
    names = [{item.name for item in chosen_items(drawn, 20, seed)} for seed in (0, 1, 0)]
    assert names[0] == names[2] and not names[0] & names[1]
    data = replace(
        folder(tmp_path, *({"question": str(i)} for i in range(9))), calibration=Split("test")
    )
    orders = [[i.question for i in chosen_items(data, 5, seed)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1] and len(set(orders[0])) == 5


def test_processors_that_cannot_ask(processor: Idefics3Processor) -> None:
    some, plain = items(1), processor_of()
    plain.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        image_windows(plain, some, PROMPT, Counted.text)
    plain.chat_template = "{% for m in messages %}{{ m.content[1].text }}{% endfor %}"
    with pytest.raises((ConfigError, DataError), match="image"):
        image_windows(plain, some, PROMPT, Counted.text)


def test_an_image_that_is_none_is_named(processor: Idefics3Processor) -> None:
    bad = replace(drawn_item("test", 0), name="7 of data", load=lambda: "nothing")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="item 7 of data"):
        answers(Oracle(processor, []), processor, [bad], PROMPT)  # type: ignore[arg-type]


def test_prompts_longer_than_the_context(
    processor: Idefics3Processor, model: PreTrainedModel
) -> None:
    long = replace(drawn_item("test", 0), question="What " * 100)
    with pytest.raises(DataError, match="exceed the model's context of 128"):
        answers(model, processor, [long], PROMPT)


def test_models_that_read_text_alone_are_told_so() -> None:
    run = compose_run(["model=tiny", "dataset=drawn", "eval=drawn"])
    with pytest.raises(ModelError, match="tiny reads text alone"):
        _ = Reader.of(run).processor
    own = compose_run(["model=tiny_vlm", "dataset=drawn"])  # eval=own: its own questions.
    assert not own.eval.texts and list(own.eval.questions) == ["own"]


def test_large_images_are_read_too(tmp_path: Path) -> None:
    Image.new("L", (640, 480)).save(tmp_path / "grey.jpg")
    found = read_items(folder(tmp_path, {"image": "grey.jpg"}), Split("test"))
    assert found[0].image.mode == "RGB"
