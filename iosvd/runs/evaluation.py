"""Measure a compressed model on texts, tasks and questions about images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from iosvd.data.items import Item
from iosvd.evaluation.perplexity import perplexity
from iosvd.evaluation.questions import answers, score
from iosvd.evaluation.zero_shot import TaskScore, ZeroShotResult, zero_shot
from iosvd.runs.partial_results import PartialResults
from iosvd.runs.reader import Reader
from iosvd.runs.run import Run
from iosvd.runs.steps import batch_size
from iosvd.windows import Windows

if TYPE_CHECKING:  # Both take seconds to import.
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel


def evaluation(
    run: Run,
    model: PreTrainedModel,
    reader: Reader,
    tasks: Mapping[str, Task],
    texts: Mapping[str, Windows],
    parts: PartialResults,
) -> dict[str, Any]:
    """Measure perplexity on every text and accuracy on every task; keep each result at once."""

    def text_perplexity(name: str) -> float:
        return perplexity(model, texts[name], batch_size(run, texts[name]))

    def task_scores(name: str) -> dict[str, Any]:
        limit, requests = run.eval.zero_shot.limit, run.runtime.resources.batch_requests
        found = zero_shot(model, reader.tokenizer, [tasks[name]], limit, requests)
        return {"score": asdict(found.scores[name]), "correct": list(found.correct[name])}

    perplexities = parts.of("evaluation", texts, text_perplexity)
    answered = parts.of("zero_shot", tasks, task_scores)
    scores = {name: found["score"] for name, found in answered.items()}
    answers = {name: found["correct"] for name, found in answered.items()}
    typed = {name: TaskScore(**score) for name, score in scores.items()}
    return {
        "perplexity": perplexities,
        "zero_shot": scores,
        "average_acc": ZeroShotResult(typed, answers).average,
        "answers": answers,
    }


def asked_questions(
    run: Run,
    model: PreTrainedModel,
    reader: Reader,
    items: Mapping[str, Sequence[Item]],
    parts: PartialResults,
) -> dict[str, Any]:
    """Measure accuracy on every set of questions about images; keep each result at once."""

    def asked(name: str) -> dict[str, Any]:
        prompt, size = run.eval.questions[name].prompt, run.runtime.resources.batch_requests
        given = answers(model, reader.processor, items[name], prompt, size)
        right = [
            found == one.answer for one, found in zip(items[name], given.generated, strict=True)
        ]
        return {"score": asdict(score(items[name], given)), "correct": right}

    found = parts.of("questions", items, asked)
    return {
        "questions": {name: one["score"] for name, one in found.items()},
        "answers": {name: one["correct"] for name, one in found.items()},
    }
