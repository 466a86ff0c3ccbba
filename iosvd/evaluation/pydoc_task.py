"""The embedded zero-shot task: which of four continuations is in the documentation of Python?

It is made from the test split of `pydoc`, so it needs no download, and scored by lm-eval like any
other. The three false continuations are the true one with one word exchanged. Spans from elsewhere
did not work: their own likelihood decided, and the embedded model was near chance (37 %).
"""

from __future__ import annotations

import random
from typing import Any

from iosvd.data.pydoc import pydoc_documents
from iosvd.errors import extra

NAME = "pydoc_continuation"
ITEMS = 200
_CONTEXT_WORDS, _CONTINUATION_WORDS, _CHOICES = 24, 8, 4
_LONGEST_SPAN = 256  # Characters: longer ones are tables of symbols, and exceed a short context.
_SEED = 0


def pydoc_items() -> list[dict[str, Any]]:
    """Return the items: `context`, `choices` (four, of eight words each) and `label`, the true one.

    All four share seven words; the exchanged ones come from elsewhere in the same split.
    """
    chooser = random.Random(_SEED)
    spans = [span for text in pydoc_documents("test") for span in _spans(text.split())]
    vocabulary = [word for span in spans for word in span]
    return [_item(span, vocabulary, chooser) for span in chooser.sample(spans, ITEMS)]


def _spans(words: list[str]) -> list[list[str]]:
    length = _CONTEXT_WORDS + _CONTINUATION_WORDS
    cut = [words[start : start + length] for start in range(0, len(words) - length + 1, length)]
    return [span for span in cut if len(" ".join(span)) <= _LONGEST_SPAN]


def _item(span: list[str], vocabulary: list[str], chooser: random.Random) -> dict[str, Any]:
    true = span[_CONTEXT_WORDS:]
    choices = [true]
    while len(choices) < _CHOICES:
        false = list(true)
        false[chooser.randrange(len(true))] = chooser.choice(vocabulary)
        if false not in choices:
            choices.append(false)
    chooser.shuffle(choices)
    return {
        "context": " ".join(span[:_CONTEXT_WORDS]),
        "choices": [" ".join(words) for words in choices],
        "label": choices.index(true),
    }


def task_config() -> dict[str, Any]:
    """Return the task in lm-eval's format."""
    metrics = ("acc", "acc_norm")
    return {
        "task": NAME,
        "custom_dataset": _load,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
        ],
        "metadata": {"version": 1.0},
    }


def _load(**_: Any) -> Any:
    with extra("datasets"):
        import datasets
    return {"test": datasets.Dataset.from_list(pydoc_items())}
