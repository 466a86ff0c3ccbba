"""Measure a compressed model on texts, tasks and questions about images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from iosvd.cache.store import Store
from iosvd.data.items import Item
from iosvd.data.visual import read_items
from iosvd.evaluation.perplexity import perplexity
from iosvd.evaluation.questions import answers, score
from iosvd.evaluation.zero_shot import (
    TaskScore,
    ZeroShotResult,
    load_tasks,
    shows_images,
    zero_shot,
)
from iosvd.runs.partial_results import PartialResults
from iosvd.runs.reader import Reader
from iosvd.runs.run import Run
from iosvd.runs.steps import batch_size
from iosvd.runs.tokens import evaluation_tokens
from iosvd.windows import Windows

if TYPE_CHECKING:  # Both take seconds to import.
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Material:
    """Texts, tasks and questions of an evaluation, loaded before any expensive work."""

    texts: Mapping[str, Windows]
    tasks: Mapping[str, Task]
    questions: Mapping[str, Sequence[Item]]

    @classmethod
    def of(cls, run: Run, reader: Reader, store: Store, revision: str | None) -> Material:
        """Load all of it.

        Args:
            run: says what.
            reader: the run's.
            store: holds windows of texts.
            revision: the hub's commit of the tokenizer.
        """
        tasks = load_tasks(run.eval.zero_shot)
        if any(shows_images(task) for task in tasks):
            _ = reader.processor  # Or the reason why there is none.
        return cls(
            texts=evaluation_tokens(run, reader, store, revision),
            tasks=dict(zip(run.eval.zero_shot.tasks, tasks, strict=True)),
            questions={n: read_items(q, q.evaluation) for n, q in run.eval.questions.items()},
        )


def evaluation(
    run: Run, model: PreTrainedModel, reader: Reader, material: Material, parts: PartialResults
) -> dict[str, Any]:
    """Measure perplexities and accuracies; keep each result at once."""
    texts, items = material.texts, material.questions

    def text_perplexity(name: str) -> float:
        return perplexity(model, texts[name], batch_size(run, texts[name]))

    def task_scores(name: str) -> dict[str, Any]:
        limit, requests = run.eval.zero_shot.limit, run.runtime.resources.batch_requests
        task, seen = material.tasks[name], reader.images
        found = zero_shot(model, reader.tokenizer, [task], limit, requests, processor=seen)
        return {"score": asdict(found.scores[name]), "correct": list(found.correct[name])}

    def question_scores(name: str) -> dict[str, Any]:
        prompt, size = run.eval.questions[name].prompt, run.runtime.resources.batch_requests
        given = answers(model, reader.processor, items[name], prompt, size)
        right = [o.answer == g for o, g in zip(items[name], given.generated, strict=True)]
        return {"score": asdict(score(items[name], given)), "correct": right}

    perplexities = parts.of("evaluation", texts, text_perplexity)
    answered = parts.of("zero_shot", material.tasks, task_scores)
    asked = parts.of("questions", items, question_scores)
    scores = {name: found["score"] for name, found in answered.items()}
    typed = {name: TaskScore(**one) for name, one in scores.items()}
    correct = {name: found["correct"] for name, found in answered.items()}
    return {
        "perplexity": perplexities,
        "zero_shot": scores,
        "average_acc": ZeroShotResult(typed, correct).average,
        "questions": {name: found["score"] for name, found in asked.items()},
        "answers": {**correct, **{name: found["correct"] for name, found in asked.items()}},
    }
