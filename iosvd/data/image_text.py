"""From questions about images to prompts, and to the windows that calibrate (METHODS 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iosvd.data.items import LETTERS, Item
from iosvd.errors import ConfigError, DataError, one_line
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import ProcessorMixin

_TEXT = ("input_ids", "attention_mask")  # What a processor returns for the tokens themselves.


class Counted(Enum):
    """Positions whose predictions count: of all text, or of the answer alone."""

    text = "text"
    answer = "answer"


class Reply(Enum):
    """What an answer is: the letter of a choice, or its text."""

    letter = "letter"
    text = "text"


@dataclass(frozen=True)
class Prompt:
    """How a question is put; the turns around it are the processor's own chat template."""

    choices: str = "Choices:"  # The line before the lettered choices; empty: they are not listed.
    request: str = "Answer with the letter."  # The last line.
    lead: str = " Answer:"  # What the answer's turn begins with.
    reply: Reply = Reply.letter

    def __post_init__(self) -> None:
        if self.reply is Reply.letter and not self.choices:
            raise ConfigError(
                "prompt.reply=letter needs choices; set prompt.choices, or reply=text"
            )

    def reply_of(self, item: Item, choice: int) -> str:
        """Return the answer that names a choice."""
        return LETTERS[choice] if self.reply is Reply.letter else item.choices[choice]

    def question(self, item: Item) -> str:
        """Return the text of the user's turn."""
        listed = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(item.choices)]
        choices = [self.choices, *listed] if self.choices else []
        lines = [item.hint, item.question, *choices, self.request]
        return "\n".join(line for line in lines if line)

    def text(self, processor: ProcessorMixin, item: Item, *, images: bool = True) -> str:
        """Return the whole prompt, which ends where the answer begins."""
        return turn(processor, self.question(item), images=images) + self.lead


def turn(processor: ProcessorMixin, text: str, *, images: bool = True) -> str:
    """Return a user's turn with an image and a text, up to where the answer begins.

    Raises:
        ConfigError: the processor has no chat template.
    """
    content = [*([{"type": "image"}] if images else []), {"type": "text", "text": text}]
    turns: list[Any] = [{"role": "user", "content": content}]
    try:
        found = processor.apply_chat_template(turns, add_generation_prompt=True)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"the processor cannot put a question about an image ({one_line(error)[:100]}); the"
            " model's folder must hold one with a chat template"
        ) from error
    return str(found)


def image_windows(
    processor: ProcessorMixin,
    items: Sequence[Item],
    prompt: Prompt,
    counted: Counted,
    *,
    images: bool = True,
) -> Windows:
    """Return items with their right answers as windows, padded to the longest.

    Args:
        processor: of the model.
        items: questions about images.
        prompt: how they are put.
        counted: positions whose predictions count.
        images: False: the same texts without images.

    Raises:
        ConfigError: the processor has no chat template or no image token.
        DataError: an item does not pass through the processor; it is named.
    """
    answered = [(item, item.answer) for item in items]
    return answered_windows(processor, answered, prompt, counted, images=images)


def answered_windows(
    processor: ProcessorMixin,
    answered: Sequence[tuple[Item, int]],
    prompt: Prompt,
    counted: Counted,
    *,
    images: bool = True,
) -> Windows:
    """Return items, each with one of its choices as the answer; otherwise as `image_windows`."""
    rows = [_encoded(processor, item, choice, prompt, images) for item, choice in answered]
    length = max(row.tokens.shape[0] for row in rows)
    filled = torch.arange(length) < torch.tensor([len(row.tokens) for row in rows])[:, None]
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    counts = torch.zeros(len(rows), length, dtype=torch.bool)
    special = set(image_tokens(processor))
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = row.tokens
        if counted is Counted.answer:
            target = torch.arange(len(row.tokens)) >= row.answer
        else:
            target = torch.tensor([token not in special for token in row.tokens.tolist()])
        counts[place, : len(row.tokens) - 1] = target[1:]
    whole = bool(filled.all())
    return Windows(tokens, None if whole else filled, counts, tuple(row.beside for row in rows))


@dataclass(frozen=True)
class _Encoded:
    tokens: Tensor  # (length,)
    answer: int  # Where it begins.
    beside: Mapping[str, Tensor]


def _encoded(
    processor: ProcessorMixin, item: Item, choice: int, prompt: Prompt, images: bool
) -> _Encoded:
    question = prompt.text(processor, item, images=images)
    end = processor.tokenizer.eos_token or ""
    encoded = encode if images else _encode_text
    whole = encoded(processor, item, f"{question} {prompt.reply_of(item, choice)}{end}")
    before = encoded(processor, item, question)
    tokens = whole.pop("input_ids")[0]
    whole.pop("attention_mask", None)
    return _Encoded(tokens, before["input_ids"].shape[1], whole)


def encode(processor: ProcessorMixin, item: Item, text: str) -> dict[str, Any]:
    """Return what a processor makes of an item's image and a text, with a batch of one.

    Raises:
        DataError: it refuses them; the item is named.
    """
    try:
        found = processor(
            text=[text], images=[[item.image]], return_tensors="pt", add_special_tokens=False
        )
    except Exception as error:  # Processors raise all kinds of errors.
        raise DataError(f"item {item.name}: {one_line(error)[:200]}") from error
    ids = found["input_ids"]
    if not any(token in set(image_tokens(processor)) for token in ids[0].tolist()):
        raise ConfigError(
            f"the processor {type(processor).__name__} puts no image token into the prompt; its"
            " chat template must have a place for an image"
        )
    return dict(found)


def _encode_text(processor: ProcessorMixin, item: Item, text: str) -> dict[str, Any]:
    return dict(processor.tokenizer([text], return_tensors="pt", add_special_tokens=False))


def image_tokens(processor: ProcessorMixin) -> list[int]:
    """Return the tokens in whose places features of images stand."""
    names = ("image_token_id", "fake_image_token_id", "global_image_token_id")
    found = [getattr(processor, name, None) for name in names]
    return [token for token in found if isinstance(token, int)]
