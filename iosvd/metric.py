"""Metrics, the columns of tables: their kind, and the text or task they are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Kinds of metrics. Lower perplexities are better, higher accuracies."""

    perplexity = "perplexity"
    accuracy = "accuracy"
    average_accuracy = "average_accuracy"
    other = "other"  # Predictions, divergences, sizes and times.


_PERPLEXITY = "_ppl"  # The end of a perplexity's name in csv files, published ones too.


@dataclass(frozen=True)
class Metric:
    """One metric; its name is that of its column in csv files."""

    kind: Kind
    of: str  # The text of a perplexity, the task of an accuracy, or what else is measured.

    @property
    def name(self) -> str:
        """The column's name: wikitext2_ppl, piqa, average_acc, predicted_kl."""
        return f"{self.of}{_PERPLEXITY}" if self.is_perplexity else self.of

    @property
    def is_perplexity(self) -> bool:
        return self.kind is Kind.perplexity

    def __str__(self) -> str:
        return self.name


AVERAGE = Metric(Kind.average_accuracy, "average_acc")


def perplexity_on(text: str) -> Metric:
    """Return the perplexity on a text."""
    return Metric(Kind.perplexity, text)


def accuracy_on(task: str) -> Metric:
    """Return the accuracy on a zero-shot task."""
    return Metric(Kind.accuracy, task)


def other(name: str) -> Metric:
    """Return a metric that is neither a perplexity nor an accuracy."""
    return Metric(Kind.other, name)
