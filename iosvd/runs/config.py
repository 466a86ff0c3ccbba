"""From Hydra's configuration to the typed values of a run, checked before a model is loaded.

`config_of` goes the other way: the options that a run records are derived from the values.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iosvd.data.texts import Dataset
from iosvd.data.visual import VisualDataset
from iosvd.errors import ConfigError, check_at_least, check_name, one_line
from iosvd.method import Goal
from iosvd.models.gguf import gguf_in
from iosvd.models.loading import Model, context_of, holds_model
from iosvd.options import number, own_error, typed_group, variant, whole_number
from iosvd.presets import method_of
from iosvd.runs.composition import compose
from iosvd.runs.run import (
    CalibrationOptions,
    Data,
    Evaluation,
    Output,
    Parallelism,
    Resources,
    Run,
    Runtime,
    Tracking,
)
from iosvd.runs.validation import check_combination
from iosvd.system.json_files import to_json
from iosvd.system.machine import cores

METHOD_GROUPS = ("whitening", "allocation", "correction", "quantization", "factorization")
CACHE = "cache_tokens"  # A ratio that counts a cache is another ratio.
PROTOCOL_LENGTH = 2048  # Tokens of a window (METHODS 9).
_RUNTIME: dict[str, type] = {"resources": Resources, "output": Output, "parallel": Parallelism}
_OPTIONAL = ("ratio", "target_kl")
_GROUPS = (
    *("model", "dataset", "calibration", *METHOD_GROUPS, "min_rank_fraction", "cache_tokens"),
    *(*_OPTIONAL, "eval", "runtime", "wandb"),
)

OmegaConf.register_new_resolver("folder_name", lambda path: Path(path).resolve().name, replace=True)
# One worker per GPU; they share the cores.
OmegaConf.register_new_resolver(
    "workers_here", lambda: torch.cuda.device_count() or 2, replace=True
)
OmegaConf.register_new_resolver(
    "threads_each", lambda workers: max(1, cores() // max(1, workers)), replace=True
)
OmegaConf.register_new_resolver(
    "model_if_there", lambda path: path if holds_model(Path(path)) else None, replace=True
)
OmegaConf.register_new_resolver(
    "gguf_in", lambda path: gguf_in(Path(path)) if path else None, replace=True
)
OmegaConf.register_new_resolver(
    "window_length",
    lambda path, gguf_file=None: min(PROTOCOL_LENGTH, context_of(path, gguf_file)),
    replace=True,
)


def compose_run(overrides: Sequence[str]) -> Run:
    """Compose and check one run."""
    return run_of(compose(overrides), overrides)


def run_of(composed: DictConfig, overrides: Sequence[str]) -> Run:
    """Check the composition of these overrides and name the run after them."""
    method = composed.hydra.runtime.choices.get("method")
    return to_run(composed, label(method, method_options(overrides)))


def label(method: str | None, overrides: Sequence[str]) -> str:
    """Name a row: the method's preset, and the overrides that make it another."""
    changed = f"[{','.join(sorted(overrides))}]" if overrides else ""
    return f"{method or 'custom'}{changed}"


def method_options(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that change a method from its preset, or what its ratio counts."""
    named = (*METHOD_GROUPS, CACHE)
    return [override for override in overrides if group_of(override) in named]


def own_option(overrides: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of an option that only one command has, and the other overrides.

    Args:
        overrides: of the command line.
        name: of the option; its last value counts, None if it is not given.
    """
    given = [line.partition("=")[2] for line in overrides if line.startswith(f"{name}=")]
    rest = [line for line in overrides if not line.startswith(f"{name}=")]
    return (given[-1] if given else None), rest


def group_of(override: str) -> str:
    """Return the group of options that an override belongs to."""
    return re.split(r"[.=]", override.lstrip("+~"))[0]


def refers_to_ratio(composed: DictConfig) -> bool:
    """Whether an option of this composition refers to the ratio."""
    mine = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    return "${ratio}" in str(OmegaConf.to_container(mine, resolve=False))


def to_run(composed: DictConfig, label: str) -> Run:
    """Check a composed configuration and turn it into values.

    Raises:
        ConfigError: an option is unknown, missing, of the wrong type or out of range.
    """
    composed = OmegaConf.masked_copy(composed, [str(k) for k in composed if k != "hydra"])
    for key in _missing(OmegaConf.to_container(composed, resolve=False), ""):
        value = "FOLDER" if key.endswith("path") else "VALUE"
        raise ConfigError(f"{key} is not set; set {key}={value}")
    try:
        OmegaConf.resolve(composed)
        config = OmegaConf.to_container(composed)
    except OmegaConfBaseException as error:
        raise own_error(error) or ConfigError(one_line(error)) from None
    assert isinstance(config, dict)
    if unknown := sorted(set(config) - set(_GROUPS)):
        raise ConfigError(f"unknown option {unknown[0]}; options: {', '.join(sorted(_GROUPS))}")
    for name in sorted(_GROUPS):
        if name not in config or (name not in _OPTIONAL and config.get(name) is None):
            raise ConfigError(f"{name} is not set; choose one of its options")
    run = Run(
        label=label,
        model=typed_group(Model, composed, "model"),
        data=Data(
            dataset=_dataset(composed),
            calibration=typed_group(CalibrationOptions, composed, "calibration"),
        ),
        method=method_of(composed),
        goal=Goal(
            ratio=_optional(composed.ratio, "ratio"),
            target_kl=_optional(composed.target_kl, "target_kl"),
            cache_tokens=whole_number(composed.cache_tokens, "cache_tokens"),
        ),
        eval=_evaluation(composed),
        runtime=_runtime(composed),
    )
    _check(run)
    return run


def config_of(run: Run) -> dict[str, Any]:
    """Return the options of a run as JSON, in the groups of conf/config.yaml."""
    method, runtime = run.method, run.runtime
    variants = {name: getattr(method, name) for name in METHOD_GROUPS}
    values: dict[str, Any] = {
        "model": run.model,
        "dataset": run.data.dataset,
        "calibration": run.data.calibration,
        **variants,
        "min_rank_fraction": method.min_rank_fraction,
        "ratio": run.goal.ratio,
        "target_kl": run.goal.target_kl,
        "cache_tokens": run.goal.cache_tokens,
        "eval": run.eval,
        "wandb": runtime.tracking,
    }
    parts = (getattr(runtime, name) for name in _RUNTIME)
    config = {name: to_json(value) for name, value in values.items()}
    config["runtime"] = {key: value for part in parts for key, value in to_json(part).items()}
    visual = {"_target_": _public_name(VisualDataset)}
    if isinstance(run.data.dataset, VisualDataset):
        config["dataset"] |= visual
    config["eval"]["questions"] = {k: v | visual for k, v in config["eval"]["questions"].items()}
    for name in set(METHOD_GROUPS) - {"factorization"}:
        config[name] = {"_target_": _public_name(type(variants[name])), **config[name]}
    return config


def _public_name(cls: type) -> str:
    """Return the name of a class in the package that exports it, else in its module."""
    package = cls.__module__.rpartition(".")[0]
    exported = package and getattr(importlib.import_module(package), cls.__qualname__, None) is cls
    return f"{package if exported else cls.__module__}.{cls.__qualname__}"


def _check(run: Run) -> None:
    """Raise ConfigError for values of the right type that make no sense."""
    check_name("model.name", run.model.name)
    check_name("dataset.name", run.data.dataset.name)
    for key, text in run.eval.texts.items():
        check_name(f"eval.texts.{key}.name", text.name)
    at_least_one = {
        "calibration.windows": run.data.calibration.windows,
        "runtime.batch_tokens": run.runtime.resources.batch_tokens,
        "runtime.batch_requests": run.runtime.resources.batch_requests,
        **(
            {}
            if run.runtime.parallel.threads is None
            else {"runtime.threads": run.runtime.parallel.threads}
        ),
    }
    # A window of one token predicts nothing.
    at_least_two = {
        "calibration.seq_len": run.data.calibration.seq_len,
        "eval.seq_len": run.eval.seq_len,
    }
    check_at_least(1, **at_least_one)
    check_at_least(2, **at_least_two)
    at_least_zero: dict[str, float] = {
        "eval.windows": run.eval.windows,
        "eval.kl_windows": run.eval.kl_windows,
        "runtime.cache_gib": run.runtime.output.cache_gib,
        "runtime.memory_gib": run.runtime.resources.memory_gib or 0.0,
    }
    check_at_least(0, **at_least_zero)
    for key, questions in run.eval.questions.items():
        check_name(f"eval.questions.{key}.name", questions.name)
    if not run.eval.texts and not run.eval.questions:
        raise ConfigError(
            "eval.texts and eval.questions are empty; choose eval=own, pydoc, paper, drawn or vlm"
        )
    if run.runtime.tracking.checkpoint and not run.runtime.output.save_checkpoint:
        raise ConfigError("wandb.checkpoint=true needs runtime.save_checkpoint=true")
    check_combination(run)


def _evaluation(composed: DictConfig) -> Evaluation:
    evaluation = typed_group(Evaluation, composed, "eval")
    # One by one: a frozen dataclass inside a dict cannot be filled by a merge.
    texts, questions = dict[str, Dataset](), dict[str, VisualDataset]()
    for name in evaluation.texts:
        if "_target_" in composed.eval.texts[name]:  # eval=own of questions about images.
            questions[name] = _visual(composed.eval.texts, name)
        else:
            texts[name] = typed_group(Dataset, composed.eval.texts, name, f"eval.texts.{name}")
    questions |= {name: _visual(composed.eval.questions, name) for name in evaluation.questions}
    return dataclasses.replace(evaluation, texts=texts, questions=questions)


def _dataset(composed: DictConfig) -> Dataset | VisualDataset:
    """Return the calibration data set: a text, unless its `_target_` says otherwise."""
    if "_target_" not in composed.dataset:
        return typed_group(Dataset, composed, "dataset")
    return _visual(composed, "dataset")


def _visual(composed: DictConfig, name: str) -> VisualDataset:
    found = variant(composed, name)
    if not isinstance(found, VisualDataset):
        raise ConfigError(f"{name}._target_={composed[name]._target_} is no data set")
    return found


def _runtime(composed: DictConfig) -> Runtime:
    """Divide the options of `runtime` among the values that hold them."""
    if not isinstance(composed.runtime, DictConfig):
        raise ConfigError(f"runtime={composed.runtime} is no group; set its options, runtime.…=…")
    names = {part: [f.name for f in dataclasses.fields(cls)] for part, cls in _RUNTIME.items()}
    known = [name for part in names.values() for name in part]
    if unknown := [str(key) for key in composed.runtime if key not in known]:
        raise ConfigError(
            f"unknown option runtime.{unknown[0]}; options of runtime: {', '.join(known)}"
        )
    parts: dict[str, Any] = {}
    for part, cls in _RUNTIME.items():
        mine = OmegaConf.masked_copy(composed.runtime, names[part])
        parts[part] = typed_group(cls, OmegaConf.create({"runtime": mine}), "runtime")
    return Runtime(**parts, tracking=typed_group(Tracking, composed, "wandb"))


def _missing(node: Any, prefix: str) -> Iterator[str]:
    """Yield the options marked mandatory (???) that have no value."""
    if node == "???":
        yield prefix
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from _missing(value, f"{prefix}.{key}" if prefix else str(key))


def _optional(value: Any, name: str) -> float | None:
    return None if value is None else number(value, name)
