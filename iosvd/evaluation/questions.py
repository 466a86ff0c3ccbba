"""Accuracy on questions about images: of generated answers, and of the likeliest choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from iosvd.data.image_text import (
    Counted,
    Prompt,
    Reply,
    answered_windows,
    encode,
    needs_specials,
)
from iosvd.data.items import LETTERS, Item
from iosvd.errors import ConfigError, DataError, one_line
from iosvd.evaluation.letters import chosen
from iosvd.models.predictions import at_labels
from iosvd.system.progress import track

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel, ProcessorMixin

NEW_TOKENS = 16  # Of an answer, greedily (METHODS 12).


@dataclass(frozen=True)
class Answers:
    """A model's answers, item by item."""

    generated: Sequence[int | None]  # Index of the choice that the answer names.
    likeliest: Sequence[int]  # Index of the choice that is the likeliest answer.


@dataclass(frozen=True)
class QuestionScore:
    """Results on one data set; accuracies are shares of the items, in [0, 1]."""

    acc: float  # Of generated answers; one that names no choice is wrong.
    acc_stderr: float
    acc_likeliest: float
    unanswered: int  # Generated answers that name no choice.
    items: int
    chance: float  # Expected of guesses.
    by_category: Mapping[str, float]  # Accuracy of generated answers.


def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    prompt: Prompt,
    batch_size: int = 32,
) -> Answers:
    """Ask a model all questions; generation is greedy, of at most 16 tokens.

    Args:
        model: a vision-language model.
        processor: its processor.
        items: the questions.
        prompt: how they are put.
        batch_size: questions per forward pass; it changes results by rounding only.

    Raises:
        ConfigError: the processor cannot put such questions.
        DataError: an item does not pass through the processor, or is longer than the context.
    """
    letters = _letter_tokens(processor, items, prompt) if prompt.reply is Reply.letter else []
    generate: Any = model.generate
    generated: list[int | None] = []
    likeliest: list[int] = []
    starts = range(0, len(items), batch_size)
    for start in track(starts, len(starts), "questions", "batch"):
        part = items[start : start + batch_size]
        batch = _batch(processor, part, prompt).to(model.device, model.dtype)
        _check_context(model, part, batch["input_ids"].shape[1])
        found = generate(
            **batch,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        texts = processor.batch_decode(
            found.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        lettered = bool(prompt.choices)
        generated += [
            chosen(t, i.choices, lettered=lettered) for i, t in zip(part, texts, strict=True)
        ]
        if letters:  # The next token says it.
            for item, logits in zip(part, found.logits[0].float(), strict=True):
                likeliest.append(int(logits[letters[: len(item.choices)]].argmax()))
        else:
            likeliest += _likeliest_texts(model, processor, part, prompt)
    return Answers(generated, likeliest)


def score(items: Sequence[Item], given: Answers) -> QuestionScore:
    """Return the accuracies of answers."""
    right = [found == item.answer for item, found in zip(items, given.generated, strict=True)]
    likely = [found == item.answer for item, found in zip(items, given.likeliest, strict=True)]
    categories: dict[str, list[bool]] = {}
    for item, one in zip(items, right, strict=True):
        if item.category:
            categories.setdefault(item.category, []).append(one)
    acc, count = _mean(right), len(items)
    return QuestionScore(
        acc=acc,
        acc_stderr=math.sqrt(acc * (1 - acc) / max(1, count - 1)),
        acc_likeliest=_mean(likely),
        unanswered=sum(found is None for found in given.generated),
        items=count,
        chance=_mean([1 / len(item.choices) for item in items]),
        by_category={name: _mean(values) for name, values in sorted(categories.items())},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _batch(processor: ProcessorMixin, items: Sequence[Item], prompt: Prompt) -> Any:
    """Return prompts and images, padded on the left."""
    texts = [prompt.text(processor, item) for item in items]
    images = [[item.image] for item in items]
    try:
        return processor(
            text=texts,
            images=images,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=needs_specials(processor, texts[0]),
        )
    except Exception as error:  # Processors raise all kinds of errors.
        for item in items:  # Names the item if one is at fault.
            encode(processor, item, prompt.text(processor, item))
        raise DataError(
            f"items {items[0].name} to {items[-1].name}: {one_line(error)[:200]}"
        ) from error


@torch.no_grad()
def _likeliest_texts(
    model: PreTrainedModel, processor: ProcessorMixin, items: Sequence[Item], prompt: Prompt
) -> list[int]:
    """Return, for each item, the choice whose whole text and end are the likeliest answer."""
    answered = [(item, choice) for item in items for choice in range(len(item.choices))]
    windows = answered_windows(processor, answered, prompt, Counted.answer)
    likelihoods = at_labels(windows.logits(model).float().log_softmax(-1), windows.labels)
    scores = iter(likelihoods.sum(1).tolist())
    found = []
    for item in items:
        mine = [next(scores) for _ in item.choices]
        found.append(max(range(len(mine)), key=mine.__getitem__))
    return found


def _letter_tokens(processor: ProcessorMixin, items: Sequence[Item], prompt: Prompt) -> list[int]:
    """Return the token with which each letter's answer begins, after the first item's prompt."""
    text = prompt.text(processor, items[0])
    before = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for letter in LETTERS[: max(len(item.choices) for item in items)]:
        whole = processor.tokenizer(f"{text} {letter}", add_special_tokens=False)["input_ids"]
        found.append(whole[len(before)] if whole[: len(before)] == before else whole[-1])
    if len(set(found)) < len(found):
        raise ConfigError(
            "the tokenizer does not tell the letters of the choices apart at the place of the"
            " answer; set eval.questions.<name>.prompt.lead"
        )
    return found


def _check_context(model: PreTrainedModel, items: Sequence[Item], length: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length + NEW_TOKENS > context:
        raise DataError(
            f"a prompt of {length} tokens among items {items[0].name} to {items[-1].name} and"
            f" {NEW_TOKENS} of its answer exceed the model's context of {context}; leave it out"
        )
