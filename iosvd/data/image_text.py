"""From questions about images to prompts, and to the windows that calibrate (METHODS 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from iosvd.data.items import LETTERS, Item
from iosvd.errors import ConfigError, DataError, one_line
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import ProcessorMixin


class Counted(Enum):
    """Positions whose predictions count: of all text, or of the answer alone."""

    text = "text"
    answer = "answer"


class Reply(Enum):
    """How an answer names a choice: by its letter or by its text."""

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
    except Exception as error:  # Templates raise errors of jinja2, and of their own.
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
    # What a processor puts around an image is special too; the end of an answer is text.
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *image_tokens(processor)} - {tokenizer.eos_token_id}
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = row.tokens
        if counted is Counted.answer:
            target = torch.arange(len(row.tokens)) >= row.answer
        else:
            target = torch.tensor([token not in special for token in row.tokens.tolist()])
        counts[place, : len(row.tokens) - 1] = target[1:]
    whole = bool(filled.all())
    beside = tuple(row.padded(length) for row in rows)
    return Windows(tokens, None if whole else filled, counts, beside)


@dataclass(frozen=True)
class _Encoded:
    tokens: Tensor  # (length,)
    answer: int  # Where it begins.
    beside: Mapping[str, Tensor]

    def padded(self, length: int) -> dict[str, Tensor]:
        """Return what is beside the tokens; kinds of tokens (1, own length) get the full length."""
        own = (1, len(self.tokens))
        return {
            name: pad(x, (0, length - own[1])) if tuple(x.shape) == own else x
            for name, x in self.beside.items()
        }


def _encoded(
    processor: ProcessorMixin, item: Item, choice: int, prompt: Prompt, images: bool
) -> _Encoded:
    question = prompt.text(processor, item, images=images)
    end = processor.tokenizer.eos_token or ""
    text = f"{question} {prompt.reply_of(item, choice)}{end}"
    whole = (encode if images else _encode_text)(processor, item, text)
    # By texts alone: the image takes as many tokens in both.
    shorter, longer = (
        _encode_text(processor, item, one)["input_ids"].shape[1] for one in (question, text)
    )
    tokens = whole.pop("input_ids")[0]
    whole.pop("attention_mask", None)
    return _Encoded(tokens, len(tokens) - (longer - shorter), whole)


def encode(processor: ProcessorMixin, item: Item, text: str) -> dict[str, Any]:
    """Return what a processor makes of an item's image and a text, with a batch of one.

    Raises:
        DataError: it refuses them; the item is named.
    """
    try:
        found = processor(
            text=[text],
            images=[[item.image]],
            return_tensors="pt",
            add_special_tokens=needs_specials(processor, text),
        )
    except Exception as error:  # Processors raise all kinds of errors.
        raise DataError(f"item {item.name}: {one_line(error)[:200]}") from error
    if not set(image_tokens(processor)) & set(found["input_ids"][0].tolist()):
        raise ConfigError(
            f"the processor {type(processor).__name__} puts no image token into the prompt; its"
            " chat template must have a place for an image"
        )
    return dict(found)


def _encode_text(processor: ProcessorMixin, item: Item, text: str) -> dict[str, Any]:
    specials = needs_specials(processor, text)
    return dict(processor.tokenizer([text], return_tensors="pt", add_special_tokens=specials))


def needs_specials(processor: ProcessorMixin, text: str) -> bool:
    """Whether the tokenizer must add its special tokens: not if the template has begun with BOS."""
    return not text.startswith(processor.tokenizer.bos_token or "\0")


def image_tokens(processor: ProcessorMixin) -> list[int]:
    """Return the tokens in whose places features of images stand."""
    names = ("image_token_id", "fake_image_token_id", "global_image_token_id")
    found = [getattr(processor, name, None) for name in names]
    return [token for token in found if isinstance(token, int)]
