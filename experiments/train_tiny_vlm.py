"""Train the embedded vision-language model on drawn questions: `make tiny-vlm` (ten minutes).

    python -m experiments.train_tiny_vlm

First the vision tower alone learns what each cell of the grid holds; then the whole model answers
questions, several about an image in turn. The result, with the settings and the curves in
`training.json`, is written to `iosvd/assets/tiny_vlm`. The same machine and Python give the same
weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from experiments.cells import Cells
from experiments.train_tiny import Schedule, fit, write_record
from iosvd.data.drawn import (
    CELL,
    COLOURS,
    NUMBERS,
    PLACES,
    SHAPES,
    Asked,
    drawn_item,
    questions_about,
    things_in,
)
from iosvd.data.image_text import Prompt, Reply, turn
from iosvd.data.items import LETTERS, Item
from iosvd.system.commands import arguments
from iosvd.windows import IGNORED

TARGET = Path(__file__).parents[1] / "iosvd" / "assets" / "tiny_vlm"
HELD_OUT = 256  # Items of the validation split at each point.
SIZE = 3 * CELL
PATCH = 8
JOINED = 2  # Patches, along each side, that become one token: a cell of the grid.
PROMPT = Prompt(choices="", request="", reply=Reply.text)  # As in conf/dataset/drawn.yaml.
# SmolVLM's turns.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role | capitalize }}:"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Recipe(Schedule):
    """Everything the weights depend on, besides the drawn items and the versions."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    mlp_width: int = 128
    eye_width: int = 48
    eye_layers: int = 2
    eye_heads: int = 4
    batch: int = 64  # Images.
    eye_steps: int = 400  # Of the vision tower alone.
    steps: int = 1600
    questions: int = 4  # About each image, at most.
    warmup_steps: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 0
    threads: int = 1


def processor_of() -> Idefics3Processor:
    """Return the processor; its tokenizer knows every word of the drawn questions."""
    texts = [*COLOURS, *SHAPES, *PLACES, *NUMBERS, "User:", "Assistant: Answer:", *LETTERS]
    texts += ["How many shapes are there?", "Which shape is?", "What colour is the?", "Where is?"]
    texts += ["Choices: Answer with the letter."]
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    words += ["."]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", *words]))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        padding_side="right",
        additional_special_tokens=["<fake_token_around_image>", "<image>", "<global-img>"],
    )
    side = {"longest_edge": SIZE}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    per_image = (SIZE // PATCH // JOINED) ** 2
    return Idefics3Processor(images, tokenizer, image_seq_len=per_image, chat_template=TEMPLATE)


def build(recipe: Recipe, processor: Idefics3Processor) -> PreTrainedModel:
    """Return the untrained model.

    The standard deviation of its weights follows their width: 0.02, the default, suits models ten
    times as wide. With it no question finds its place in the image for a thousand steps.
    """
    tokenizer = processor.tokenizer
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.width,
        "intermediate_size": recipe.mlp_width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.key_value_heads,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": recipe.width**-0.5,
    }
    eye = {
        "hidden_size": recipe.eye_width,
        "intermediate_size": 4 * recipe.eye_width,
        "num_hidden_layers": recipe.eye_layers,
        "num_attention_heads": recipe.eye_heads,
        "image_size": SIZE,
        "patch_size": PATCH,
        "initializer_range": recipe.eye_width**-0.5,
    }
    config = Idefics3Config(
        text_config=text,
        vision_config=eye,
        image_token_id=processor.image_token_id,
        scale_factor=JOINED,
        tie_word_embeddings=False,
        **{"pad_token_id": tokenizer.pad_token_id},
    )
    return AutoModelForImageTextToText.from_config(config)


@dataclass(frozen=True)
class Example:
    """An image, and questions and answers about it in turn."""

    image: Any
    turns: Sequence[tuple[str, str]]


def examples(recipe: Recipe, step: int) -> list[Example]:
    """Return the examples of a step."""
    return [example(number, recipe.questions) for number in _numbers(recipe, step)]


def example(number: int, questions: int) -> Example:
    """Return one image of the training split with some of the questions about it."""
    possible = questions_about(things_in("train", number)).values()
    asked: list[Asked] = [one for several in possible for one in several]
    chosen = random.Random(number).sample(asked, min(questions, len(asked)))
    return Example(drawn_item("train", number).image, [(a.question, a.right) for a in chosen])


def asked_once(item: Item) -> Example:
    """Return a question as it is evaluated."""
    return Example(item.image, [(item.question, item.choices[item.answer])])


def text_of(processor: ProcessorMixin, given: Example) -> str:
    """Return the text of an example; its first turn has the image."""
    end, found = processor.tokenizer.eos_token, ""
    for number, (question, answer) in enumerate(given.turns):
        prompt = turn(processor, question) + PROMPT.lead
        found += prompt if number == 0 else prompt.replace("<image>", "")
        found += f" {answer}{end}"
    return found


def batch_of(
    processor: ProcessorMixin, given: Sequence[Example]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch and the labels of its answers."""
    texts = [text_of(processor, one) for one in given]
    images = [[one.image] for one in given]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, (tokens, one) in enumerate(zip(batch["input_ids"], given, strict=True)):
        ends = (tokens == processor.tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        # Every other end is a question's.
        for (_, answer), end in zip(one.turns, ends[1::2], strict=True):
            start = end - len(processor.tokenizer(answer)["input_ids"])
            labels[row, start : end + 1] = tokens[start : end + 1]
    return dict(batch), labels


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens, in nats."""
    loss: Tensor = model(**batch, labels=labels).loss
    return loss


@torch.no_grad()
def accuracy(model: PreTrainedModel, processor: ProcessorMixin, items: list[Item]) -> float:
    """Return the share of items whose whole answer is the likeliest, token by token."""
    batch, labels = batch_of(processor, [asked_once(item) for item in items])
    found = model(**batch).logits[:, :-1].argmax(-1)
    wrong = (found != labels[:, 1:]) & (labels[:, 1:] != IGNORED)
    return 1 - float(wrong.any(1).float().mean())


def _numbers(recipe: Recipe, step: int) -> range:
    return range(step * recipe.batch, (step + 1) * recipe.batch)


def train(recipe: Recipe) -> None:
    """Train the model, and write its folder."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    processor = processor_of()
    model = build(recipe, processor).train()
    cells = Cells(model, processor)
    first = fit(
        cells,
        replace(recipe, steps=recipe.eye_steps),
        lambda step: cells.loss("train", _numbers(recipe, step)),
        lambda: {"cells": round(cells.accuracy("validation", range(HELD_OUT)), 4)},
    )
    held_out = [drawn_item("validation", number) for number in range(HELD_OUT)]

    def measured() -> dict[str, float]:
        model.eval()
        found = round(accuracy(model, processor, held_out), 4)
        model.train()
        return {"accuracy": found}

    curve = fit(
        model,
        recipe,
        lambda step: loss_of(model, *batch_of(processor, examples(recipe, step))),
        measured,
    )
    model.eval().bfloat16().save_pretrained(TARGET)
    processor.save_pretrained(TARGET)
    write_record(
        TARGET,
        recipe,
        model,
        [*first, *curve],
        seconds=round(time.monotonic() - started),
    )


if __name__ == "__main__":
    arguments(__doc__)
    train(Recipe())
