"""Train the embedded vision-language model on drawn questions: `make tiny-vlm` (20 minutes).

    python -m experiments.train_tiny_vlm

The result, with the settings and the end of the curve in `training.json`, is written to
`iosvd/assets/tiny_vlm`. The same machine and Python give the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
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

from experiments.train_tiny import Schedule, fit, write_record
from iosvd.data.drawn import CELL, COLOURS, NUMBERS, PLACES, SHAPES, description, drawn_item
from iosvd.data.image_text import Prompt, Reply, turn
from iosvd.data.items import LETTERS, Item
from iosvd.system.commands import arguments
from iosvd.windows import IGNORED

TARGET = Path(__file__).parents[1] / "iosvd" / "assets" / "tiny_vlm"
HELD_OUT = 256  # Items of the validation split at each point.
SIZE = 3 * CELL
PATCH = 8
JOINED = 2  # Patches, along each side, that become one token: a cell of the grid.
DESCRIBE = "Describe the image."
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

    width: int = 192
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2
    mlp_width: int = 512
    eye_width: int = 96
    eye_layers: int = 3
    eye_heads: int = 4
    batch: int = 64
    steps: int = 2200
    warmup_steps: int = 100
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    # Share of the training items whose image is described, cell by cell, which teaches to see: at
    # first, and at the end. The others answer the item's question.
    described: tuple[float, float] = (0.6, 0.2)
    between: tuple[float, float] = (0.3, 0.6)  # Shares of the steps, while one becomes the other.
    seed: int = 0
    threads: int = 1
    betas: tuple[float, float] = field(default=(0.9, 0.98))


def processor_of() -> Idefics3Processor:
    """Return the processor; its tokenizer knows every word of the drawn questions."""
    texts = [*COLOURS, *SHAPES, *PLACES, *NUMBERS, "User:", "Assistant: Answer:", *LETTERS]
    texts += ["How many shapes are there?", "Which shape is?", "What colour is the?", "Where is?"]
    texts += ["Choices: Answer with the letter.", f"{DESCRIBE} none"]
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
    """Return the untrained model."""
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
    }
    eye = {
        "hidden_size": recipe.eye_width,
        "intermediate_size": 4 * recipe.eye_width,
        "num_hidden_layers": recipe.eye_layers,
        "num_attention_heads": recipe.eye_heads,
        "image_size": SIZE,
        "patch_size": PATCH,
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
    """A prompt about an image, and its answer."""

    image: Any
    prompt: str
    answer: str


def examples(processor: ProcessorMixin, recipe: Recipe, step: int) -> list[Example]:
    """Return the examples of a step: descriptions, then questions."""
    start, stop = recipe.between
    late = min(1.0, max(0.0, (step / recipe.steps - start) / (stop - start)))
    described = recipe.described[0] + (recipe.described[1] - recipe.described[0]) * late
    found = []
    for place, number in enumerate(range(step * recipe.batch, (step + 1) * recipe.batch)):
        item = drawn_item("train", number)
        if place < described * recipe.batch:
            prompt = turn(processor, DESCRIBE) + PROMPT.lead
            found.append(Example(item.image, prompt, description("train", number)))
        else:
            found.append(asked(processor, item))
    return found


def asked(processor: ProcessorMixin, item: Item) -> Example:
    """Return a question as it is evaluated."""
    return Example(item.image, PROMPT.text(processor, item), PROMPT.reply_of(item, item.answer))


def batch_of(
    processor: ProcessorMixin, given: Sequence[Example]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch and the labels of its answers."""
    end = processor.tokenizer.eos_token
    texts = [f"{one.prompt} {one.answer}{end}" for one in given]
    images = [[one.image] for one in given]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        start = length - len(processor.tokenizer(f"{given[row].answer}{end}")["input_ids"])
        labels[row, start:length] = batch["input_ids"][row, start:length]
    return dict(batch), labels


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens, in nats."""
    loss: Tensor = model(**batch, labels=labels).loss
    return loss


@torch.no_grad()
def accuracy(model: PreTrainedModel, processor: ProcessorMixin, items: list[Item]) -> float:
    """Return the share of items whose whole answer is the likeliest, token by token."""
    batch, labels = batch_of(processor, [asked(processor, item) for item in items])
    found = model(**batch).logits[:, :-1].argmax(-1)
    wrong = (found != labels[:, 1:]) & (labels[:, 1:] != IGNORED)
    return 1 - float(wrong.any(1).float().mean())


def train(recipe: Recipe) -> None:
    """Train the model, and write its folder."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    processor = processor_of()
    model = build(recipe, processor).train()
    held_out = [drawn_item("validation", number) for number in range(HELD_OUT)]

    def loss_at(step: int) -> Tensor:
        return loss_of(model, *batch_of(processor, examples(processor, recipe, step)))

    def measured() -> dict[str, float]:
        model.eval()
        found = round(accuracy(model, processor, held_out), 4)
        model.train()
        return {"accuracy": found}

    curve = fit(model, recipe, loss_at, measured)
    model.eval().bfloat16().save_pretrained(TARGET)
    processor.save_pretrained(TARGET)
    write_record(
        TARGET,
        recipe,
        model,
        curve,
        training_items=recipe.steps * recipe.batch,
        seconds=round(time.monotonic() - started),
    )


if __name__ == "__main__":
    arguments(__doc__)
    train(Recipe())
