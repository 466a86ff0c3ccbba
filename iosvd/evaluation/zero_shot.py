"""Zero-shot accuracy through lm-eval, with its stock prompts (METHODS 9)."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iosvd.errors import DataError, check_at_least, extra, one_line
from iosvd.evaluation import pydoc_task
from iosvd.evaluation.multimodal import check_room, seeing_lm
from iosvd.system.hub_cache import unwritable_cache
from iosvd.system.progress import bars_for_people, counted

if TYPE_CHECKING:  # Both take seconds to import.
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class ZeroShot:
    """The tasks to measure, and the source of their items."""

    # Names of lm-eval's, or the embedded pydoc_continuation.
    tasks: list[str] = field(default_factory=list)
    path: str | None = None  # A folder with a folder for each task, which precedes the hub.
    limit: int = 0  # Only the first so many items of each task; 0: all.

    def __post_init__(self) -> None:
        check_at_least(0, limit=self.limit)


@dataclass(frozen=True)
class TaskScore:
    """lm-eval's results on one task; accuracies are shares of the items, in [0, 1]."""

    acc: float
    acc_stderr: float | None  # None of a single item.
    acc_norm: float | None  # By the length of the answers in bytes; not every task has it.
    acc_norm_stderr: float | None
    items: int
    version: str


@dataclass(frozen=True)
class ZeroShotResult:
    """The scores, and for each task which of its items (by position) were answered correctly."""

    scores: Mapping[str, TaskScore]
    correct: Mapping[str, Sequence[bool]]

    @property
    def average(self) -> float | None:
        """The mean of `acc` over the tasks, as in the papers' tables."""
        values = [score.acc for score in self.scores.values()]
        return sum(values) / len(values) if values else None


def load_tasks(options: ZeroShot) -> list[Task]:
    """Load the tasks and their items, before any expensive work.

    Raises:
        DataError: no such task, one without an accuracy, a folder without its split, or no
            network.
    """
    quiet = logging.getLogger("lm_eval")
    quiet.setLevel(max(quiet.level, logging.ERROR))  # It warns about its own defaults.
    with bars_for_people():
        tasks = [_load_task(name, options) for name in options.tasks]
    for name, task in zip(options.tasks, tasks, strict=True):
        measured = {metric["metric"] for metric in task.config.metric_list or ()}
        chooses = task.OUTPUT_TYPE == "multiple_choice" or shows_images(task)
        if not chooses or "acc" not in measured:
            raise DataError(
                f"{name} is no multiple-choice task with an accuracy; leave it out of"
                " eval.zero_shot.tasks"
            )
    return tasks


def shows_images(task: Task) -> bool:
    """Whether a task's items have images; their answers are generated."""
    return task.config.doc_to_image is not None


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    limit: int = 0,
    batch_size: int = 32,
    processor: ProcessorMixin | None = None,
) -> ZeroShotResult:
    """Measure a loaded model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: as `load_tasks` returns them; all of them with images, or none.
        limit: only the first so many items of each task; 0: all.
        batch_size: requests (an answer to an item each) per forward pass; it changes the result
            by rounding only.
        processor: of text and images, for tasks with images.

    Raises:
        DataError: an answer does not fit the model's context.
    """
    if not tasks:
        return ZeroShotResult({}, {})
    with extra("lm_eval"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

    if with_images := shows_images(tasks[0]):
        assert processor is not None
        lm = seeing_lm(model, processor, batch_size)
        check_room(tasks, lm)
    else:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        _report(lm, model)
    try:
        with bars_for_people():
            found = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                limit=limit or None,
                task_manager=_manager(),
                apply_chat_template=with_images,
                # lm-eval guesses where it reads no answer.
                random_seed=0 if with_images else None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
    except AssertionError as error:  # lm-eval's way to report an answer longer than the context.
        if with_images:
            raise
        raise DataError(
            f"lm-eval refused a request, most likely an answer longer than the context of"
            f" {lm.max_length} tokens; leave its task out of eval.zero_shot.tasks"
        ) from error
    assert found is not None
    return ZeroShotResult(
        scores={name: _score(found, name) for name in found["results"]},
        correct={name: _correct(samples) for name, samples in found["samples"].items()},
    )


def _report(lm: Any, model: PreTrainedModel) -> None:
    """Let lm-eval's model report how far it is; a terminal has lm-eval's own bar."""
    # Not public, but the version is pinned: only here are requests tokens.
    plain = lm._loglikelihood_tokens

    def loglikelihood(requests: list[Any], *rest: Any, **options: Any) -> Any:
        # Answers that differ in their last token alone share a row of a batch.
        rows = {(*context, *answer[:-1]) for _, context, answer in requests}
        with counted(len(rows), "zero-shot", "answer") as loop:
            hook = model.register_forward_hook(lambda *call: loop.advance(len(call[-1].logits)))
            try:
                return plain(requests, *rest, **options)
            finally:
                hook.remove()

    lm._loglikelihood_tokens = loglikelihood


def task_folder(options: ZeroShot, name: str) -> Path:
    """Return the local folder of a task's items.

    Raises:
        DataError: there is none.
    """
    folder = Path(options.path or "") / name
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; eval.zero_shot.path must hold a folder for each task, or be"
            " null for the hub"
        )
    return folder


def task_file(options: ZeroShot, name: str) -> Path:
    """Return the local file of the split that a task is measured on.

    Raises:
        DataError: the folder has no such file, or there is no such task.
    """
    split = _split(name)
    folder = task_folder(options, name)
    found = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    for path in found:
        if path.is_file():
            return path
    raise DataError(
        f"{folder} has no {split}{' or '.join(SUFFIXES)}, the split that {name} is measured on;"
        " set eval.zero_shot.path to a folder that has it, or to null for the hub"
    )


def _load_task(name: str, options: ZeroShot) -> Task:
    if name == pydoc_task.NAME:
        return _only(_manager().load([pydoc_task.task_config()])["tasks"])
    stock = _stock_yaml(name)
    if options.path is None:
        return _load_named(name, f"include: {stock}\n", "the hub")
    path = task_file(options, name)
    lines = [f"include: {stock}", f"dataset_path: {path.parent.resolve()}", "dataset_name: null"]
    # Stock tasks name splits that a folder need not have; lm-eval would look for them.
    lines += [f"{kind}_split: null" for kind in ("training", "validation", "test")]
    lines += ["fewshot_split: null", f"test_split: {path.stem}"]
    unique = {line.split(":")[0]: line for line in lines}
    return _load_named(name, "\n".join(unique.values()) + "\n", str(path.parent))


def _load_named(name: str, yaml: str, where: str) -> Task:
    """Load a task through a YAML of its own, the documented way to change a stock one."""
    with extra("lm_eval"):
        from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{name}.yaml").write_text(f"task: {name}\n{yaml}", encoding="utf-8")
        try:
            manager = TaskManager(include_path=folder, include_defaults=False)
            return _only(manager.load([name])["tasks"])
        # datasets and templates raise many types for damaged or missing items.
        except Exception as error:
            if (remedy := unwritable_cache(error)) is not None:
                raise DataError(f"cannot load the items of {name}: {remedy}") from error
            cause = one_line(error.__cause__ or error)[:200]
            raise DataError(
                f"cannot load the items of {name} from {where}: {cause};"
                " set eval.zero_shot.path=FOLDER to a folder with a folder for each task"
            ) from error


@functools.cache
def _manager() -> TaskManager:
    with extra("lm_eval"):
        from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


@functools.cache
def _stock() -> Mapping[str, Any]:
    with extra("lm_eval"):
        from lm_eval.tasks import TaskManager

    return TaskManager().task_index  # Reads thousands of files: ten seconds, once.


def _stock_yaml(name: str) -> Path:
    entry = _stock().get(name)
    if entry is None or entry.yaml_path is None or entry.kind.name != "TASK":
        raise DataError(f"lm-eval has no single task {name}; `lm_eval ls tasks` lists them")
    return Path(entry.yaml_path)


def _split(name: str) -> str:
    """Name the split that lm-eval measures a stock task on."""
    # Not public, but the version is pinned, and nothing public follows an `include`.
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = load_yaml(_stock_yaml(name), resolve_func=False)
    return str(stock.get("test_split") or stock["validation_split"])


def _only(tasks: Mapping[str, Task]) -> Task:
    (task,) = tasks.values()
    return task


def _score(found: Mapping[str, Any], name: str) -> TaskScore:
    result = found["results"][name]
    # lm-eval's keys name the filter of the answers; these tasks have none.

    def number(key: str) -> float | None:
        value = result.get(f"{key},none")
        return float(value) if isinstance(value, int | float) else None  # Or "N/A".

    return TaskScore(
        acc=float(result["acc,none"]),
        acc_stderr=number("acc_stderr"),
        acc_norm=number("acc_norm"),
        acc_norm_stderr=number("acc_norm_stderr"),
        items=int(found["n-samples"][name]["effective"]),
        version=str(found["versions"][name]),
    )


def _correct(samples: Sequence[Mapping[str, Any]]) -> list[bool]:
    by_position = sorted(samples, key=lambda sample: sample["doc_id"])
    return [bool(sample["acc"]) for sample in by_position]
