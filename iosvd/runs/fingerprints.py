"""The identity of a run: a hash of its options and of the contents of its inputs."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

from iosvd.cache.disk import HASHES, Cache
from iosvd.data import drawn
from iosvd.data.texts import Dataset, Split, local_file
from iosvd.data.visual import VisualDataset, local_items
from iosvd.errors import DataError, ModelError
from iosvd.evaluation import pydoc_task
from iosvd.evaluation.zero_shot import ZeroShot, task_folder
from iosvd.models.attention_form import Form
from iosvd.models.loading import folder_of
from iosvd.runs.config import config_of
from iosvd.runs.run import Run
from iosvd.system.files import blocks_of, own_folder
from iosvd.system.json_files import DamagedError, read_sealed, to_json, write_sealed

_LARGE_BYTES = 2**28  # About a second to read.


def digest(run: Run) -> str:
    """Return the identity of a run: a hash of everything its result depends on.

    Local folders count by their content, not their path; `runtime`, `wandb` and the label do not
    count.
    """
    apart = ("runtime", "eval", "wandb")
    config = config_of(run)
    identity: dict[str, Any] = {k: v for k, v in config.items() if k not in apart}
    # Earlier versions recorded the ratio 1 as an integer.
    identity["ratio"] = int(run.goal.ratio) if run.goal.ratio == 1 else run.goal.ratio
    if run.goal.cache_tokens == 0:  # Nor this option.
        del identity["cache_tokens"]
    dataset = run.data.dataset
    model = _without_place(config["model"])
    if run.model.gguf_file is None:  # Earlier versions did not have the option.
        del model["gguf_file"]
    if run.model.sites.form is Form.separate:  # Nor this one.
        model["sites"] = {k: v for k, v in model["sites"].items() if k != "form"}
    identity["model"] = model | {"content": _model_content(run)}
    identity["dataset"] = _dataset(run, config["dataset"], dataset, dataset.calibration)
    tasks = _tasks(config["eval"]["zero_shot"], run.eval.zero_shot)
    texts = {
        name: _dataset(run, config["eval"]["texts"][name], text, text.evaluation)
        for name, text in run.eval.texts.items()
    }
    questions = {
        name: _dataset(run, config["eval"]["questions"][name], asked, asked.evaluation)
        for name, asked in run.eval.questions.items()
    }
    identity["eval"] = {**config["eval"], "texts": texts, "zero_shot": tasks}
    identity["eval"]["questions"] = questions
    if not questions:  # Earlier versions did not have them.
        del identity["eval"]["questions"]
    return _hash_of(identity)[:12]


def model_identity(run: Run, revision: str | None) -> str:
    """Return a hash that identifies the weights of a run's model in its dtype.

    Args:
        run: the run.
        revision: the hub's commit that it was loaded from.
    """
    content = _model_content(run)
    model = run.model
    source = content or [model.hub_id, revision or model.revision]
    if content is None and model.gguf_file is not None:
        source = [*source, model.gguf_file]
    return _hash_of({"source": source, "dtype": run.model.dtype.value})


def tokens_identity(
    run: Run, dataset: Dataset, split: Split, options: dict[str, Any], revision: str | None
) -> dict[str, Any]:
    """Return everything that the windows of a text depend on: text, tokenizer, cutting.

    Args:
        run: the run.
        dataset, split: the text.
        options: how windows are cut.
        revision: the hub's commit of the tokenizer.
    """
    return {
        "model": model_identity(run, revision),
        "dataset": _dataset(run, to_json(dataset), dataset, split),
        "split": to_json(split),
        **options,
    }


def _hash_of(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _without_place(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "path"}


def _model_content(run: Run) -> str | None:
    folder = folder_of(run.model)
    if folder is None:
        return None
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a model folder; set model.path")
    try:
        file = run.model.gguf_file
        files = _files(folder) if file is None else [folder / file]
        return _hash_files(*files, cache=Path(run.runtime.output.cache))
    except OSError as error:
        raise ModelError(
            f"cannot read the model in {folder}: {error.strerror}: {error.filename}; ask its owner"
            " for permission, or set model.path to a copy"
        ) from error


def _dataset(
    run: Run, options: dict[str, Any], dataset: Dataset | VisualDataset, split: Split
) -> dict[str, Any]:
    content = None
    if isinstance(dataset, VisualDataset):
        if dataset.path is not None:
            listed, folder = local_items(dataset, split), Path(dataset.path)
            images = (
                p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".jsonl", ".md")
            )
            content = _hash_text(listed, *sorted(images), cache=Path(run.runtime.output.cache))
        elif dataset.drawn:
            content = _hash_text(Path(drawn.__file__))  # What draws them.
    elif dataset.path is not None:
        content = _hash_text(local_file(dataset, split))
    elif dataset.builtin:
        content = platform.python_version()  # The text depends on the Python version.
    return _without_place(options) | {"content": content}


def _tasks(options: dict[str, Any], zero_shot: ZeroShot) -> dict[str, Any]:
    content: dict[str, str] = {}
    for name in zero_shot.tasks:
        if name == pydoc_task.NAME:
            content[name] = platform.python_version()
        elif zero_shot.path is not None:
            content[name] = _hash_text(*_files(task_folder(zero_shot, name)))
    return _without_place(options) | {"content": content}


def _hash_text(*paths: Path, cache: Path | None = None) -> str:
    try:
        return _hash_files(*paths, cache=cache)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}; ask its owner for permission, or set"
            " the path of its data set or tasks to a copy"
        ) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")


def _hash_files(*paths: Path, cache: Path | None = None) -> str:
    """Return a hash of the files' names and bytes.

    Files of the same size and time are taken to be unchanged: this process, and others that find
    the hash in the cache, do not read large files again.
    """
    stats = [path.stat() for path in paths]
    return _hash(
        tuple((p, s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)),
        cache if sum(s.st_size for s in stats) > _LARGE_BYTES else None,
    )


@functools.cache
def _hash(files: tuple[tuple[Path, int, int], ...], cache: Path | None) -> str:
    if cache is None:
        return _hash_bytes(files)
    Cache(cache).claim()
    known = [[str(path.resolve()), size, time] for path, size, time in files]
    place = own_folder(cache, HASHES) / f"{_hash_of({'files': known})[:32]}.json"
    try:
        return str(read_sealed(place)["hash"])
    except (OSError, DamagedError, KeyError):
        found = _hash_bytes(files)
    write_sealed(place, {"files": known, "hash": found})
    return found


def _hash_bytes(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.sha256()
    for path, size, _ in files:
        total.update(f"{path.name} {size} ".encode())
        for block in blocks_of(path):
            total.update(block)
    return total.hexdigest()[:16]
