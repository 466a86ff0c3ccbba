"""Qwen2-VL's processor wants a part for videos, which wants torchvision; images need neither."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from seeing import CONFIGS
from transformers import AutoModelForImageTextToText, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.utils.import_utils import DummyObject

from experiments.train_tiny_vlm import processor_of
from iosvd.data.drawn import drawn_item
from iosvd.data.image_text import Prompt, encode
from iosvd.layers.replacement import compressed_layers
from iosvd.models.loading import Dtype, Model, load_processor
from iosvd.models.processor import can_do_without, reading_class
from iosvd.runs.config import compose_run
from iosvd.runs.execution import Outcome, execute
from iosvd.runs.records import read_metrics, run_folder

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
TEMPLATE = (
    "{% for message in messages %}User: {% for part in message.content %}"
    "{% if part.type == 'image' %}" + START + IMAGE + END + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %} Assistant:"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small Qwen2-VL that was not trained, in a folder like those of the hub."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    tokenizer = processor_of().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END, IMAGE, VIDEO]})
    tokenizer.save_pretrained(folder)
    # Patches of 4 × 4 pixels, joined 2 × 2: an image of 32 × 32 is 16 tokens.
    images = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=1, merge_size=2, min_pixels=1024, max_pixels=1024
    )
    images.save_pretrained(folder)
    written = folder / "preprocessor_config.json"
    named = {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    written.write_text(json.dumps({**json.loads(written.read_text()), **named}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = CONFIGS["qwen2_vl"]()
    config.text_config.vocab_size = len(tokenizer)
    for name, token in (("image", IMAGE), ("video", VIDEO)):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    config.vision_start_token_id = tokenizer.convert_tokens_to_ids(START)
    config.vision_end_token_id = tokenizer.convert_tokens_to_ids(END)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).eval().save_pretrained(folder)
    return Model("qwen2_vl", path=str(folder), dtype=Dtype.float32, seq_len=64)


def processor(source: Model) -> ProcessorMixin:
    found = load_processor(source)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qwen2_vl.Qwen2VL", True),
        ("qwen2_5_vl.Qwen2_5_VL", True),
        ("internvl.InternVL", True),
        ("llava_onevision.LlavaOnevision", True),
        ("smolvlm.SmolVLM", False),  # Asks the part for the number of frames of any prompt.
        ("llava_next_video.LlavaNextVideo", False),  # The part is the first.
        ("idefics3.Idefics3", False),  # Has no such part.
    ],
)
def test_which_processors_can_do_without_videos(kind: str, expected: bool) -> None:
    family, _, name = kind.partition(".")
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    assert can_do_without(getattr(module, f"{name}Processor")) is expected


def test_what_stands_for_a_class_whose_libraries_are_missing_cannot() -> None:
    class Missing(metaclass=DummyObject):
        _backends = ("torchvision",)

    assert not can_do_without(Missing)


def test_without_the_part_all_else_is_read(source: Model) -> None:
    found = reading_class(Qwen2VLProcessor).from_pretrained(source.path)
    assert not hasattr(found, "video_processor") and found.chat_template == TEMPLATE
    assert type(found).__name__ == "Qwen2VLProcessor"


def question(found: ProcessorMixin) -> dict[str, Any]:
    item = drawn_item("test", 0)
    return encode(found, item, Prompt().text(found, item))


def test_images_become_what_the_image_processor_makes_of_them(source: Model) -> None:
    found = processor(source)
    given = question(found)
    image = drawn_item("test", 0).image
    alone = found.image_processor(images=[image], return_tensors="pt")
    assert torch.equal(given["pixel_values"], alone["pixel_values"])
    assert given["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert (given["input_ids"] == found.image_token_id).sum() == 16


def test_a_run_asks_about_images_and_saves_the_processor(source: Model, tmp_path: Path) -> None:
    run = compose_run(
        [
            *("model=local", f"model.path={source.path}", "dataset=drawn", "eval=drawn"),
            *("model.dtype=float32", "calibration.windows=12", "method=io_svd", "ratio=0.6"),
            *("eval.questions.drawn.evaluation.max_documents=8", f"runtime.results={tmp_path}"),
            "runtime.save_checkpoint=true",
        ]
    )
    assert execute(run) is Outcome.complete
    (answers,) = read_metrics(run_folder(run))["questions"].values()
    assert answers["items"] == 8
    folder = run_folder(run) / "checkpoint"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert compressed_layers(model)
    kept = json.loads((folder / "processor_config.json").read_text())
    # transformers takes the settings for images where a folder has none for videos.
    assert kept["video_processor"]["patch_size"] == kept["image_processor"]["patch_size"] == 4
    given = question(processor(Model("again", path=str(folder))))
    assert all(torch.equal(given[name], x) for name, x in question(processor(source)).items())
    with torch.no_grad():
        logits = model(**given).logits
        given["pixel_values"] = -given["pixel_values"]
        assert not torch.allclose(model(**given).logits[0, -1], logits[0, -1])
