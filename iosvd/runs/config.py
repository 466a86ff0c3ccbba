"""From Hydra's configuration to the typed values of a run, checked before anything is loaded.

The schemas are the implementing dataclasses themselves, so no option is written twice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
import torch
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from iosvd.data.texts import Dataset
from iosvd.errors import ConfigError, check_at_least, check_name, one_line
from iosvd.factorization import Factorization
from iosvd.models.loading import Model, context_of
from iosvd.runs.run import Calibration, Evaluation, Run, Runtime, Tracking
from iosvd.runs.validation import check_combination
from iosvd.system.machine import cores

CONF = Path(__file__).parents[2] / "conf"
METHOD_GROUPS = ("whitening", "allocation", "correction", "quantization", "factorization")
PROTOCOL_LENGTH = 2048  # Tokens of a window (METHODS 9).
Value = TypeVar("Value")

# The default of `ratio`; there is none beside a target.
OmegaConf.register_new_resolver(
    "ratio_unless", lambda target: 0.8 if target is None else None, replace=True
)
OmegaConf.register_new_resolver(
    "below",
    lambda ratio, limit, then, otherwise: (
        then if ratio is not None and ratio < limit else otherwise
    ),
    replace=True,
)
OmegaConf.register_new_resolver("folder_name", lambda path: Path(path).resolve().name, replace=True)
# Workers side by side: as many as there are GPUs, and the cores divided among them.
OmegaConf.register_new_resolver(
    "workers_here", lambda: torch.cuda.device_count() or 2, replace=True
)
OmegaConf.register_new_resolver(
    "threads_each", lambda workers: max(1, cores() // max(1, workers)), replace=True
)
OmegaConf.register_new_resolver(
    "window_length", lambda path: min(PROTOCOL_LENGTH, context_of(path)), replace=True
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
    """Return the overrides that change a method from its preset."""
    return [override for override in overrides if group_of(override) in METHOD_GROUPS]


def own_option(overrides: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of a command's own option, written as the others are, and the others.

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
    """Whether an option of this composition hangs on the ratio."""
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
        # A resolver's own error is the cause, and says more than its wrapper.
        raise ConfigError(one_line(error.__cause__ or error)) from None
    assert isinstance(config, dict)
    known = {f.name for f in dataclasses.fields(Run)} - {"label", "config"}
    optional = {"ratio", "target_kl"}
    if unknown := sorted(set(config) - known):
        raise ConfigError(f"unknown option {unknown[0]}; options: {', '.join(sorted(known))}")
    for name in sorted(known):
        if name not in config or (name not in optional and config.get(name) is None):
            raise ConfigError(f"{name} is not set; choose one of its options")
    run = Run(
        label=label,
        model=typed_group(Model, composed, "model"),
        dataset=typed_group(Dataset, composed, "dataset"),
        calibration=typed_group(Calibration, composed, "calibration"),
        whitening=_variant(composed, "whitening"),
        allocation=_variant(composed, "allocation"),
        correction=_variant(composed, "correction"),
        quantization=_variant(composed, "quantization"),
        factorization=typed_group(Factorization, composed, "factorization"),
        ratio=_optional(composed.ratio, "ratio"),
        target_kl=_optional(composed.target_kl, "target_kl"),
        min_rank_fraction=number(composed.min_rank_fraction, "min_rank_fraction"),
        eval=_evaluation(composed),
        runtime=typed_group(Runtime, composed, "runtime"),
        wandb=typed_group(Tracking, composed, "wandb"),
        config=config,  # type: ignore[arg-type]
    )
    _check(run)
    return run


def _check(run: Run) -> None:
    """Raise on values that are of the right type but make no sense."""
    check_name("model.name", run.model.name)
    check_name("dataset.name", run.dataset.name)
    for key, text in run.eval.texts.items():
        check_name(f"eval.texts.{key}.name", text.name)
    at_least_one = {
        "calibration.windows": run.calibration.windows,
        "runtime.batch_tokens": run.runtime.batch_tokens,
        "runtime.batch_requests": run.runtime.batch_requests,
        **({} if run.runtime.threads is None else {"runtime.threads": run.runtime.threads}),
    }
    # A window of one token predicts nothing.
    at_least_two = {
        "calibration.seq_len": run.calibration.seq_len,
        "eval.seq_len": run.eval.seq_len,
    }
    check_at_least(1, **at_least_one)
    check_at_least(2, **at_least_two)
    at_least_zero: dict[str, float] = {
        "eval.windows": run.eval.windows,
        "eval.kl_windows": run.eval.kl_windows,
        "runtime.cache_gib": run.runtime.cache_gib,
        "runtime.memory_gib": run.runtime.memory_gib or 0.0,
    }
    check_at_least(0, **at_least_zero)
    if not run.eval.texts:
        raise ConfigError("eval.texts is empty; choose eval=own, eval=pydoc or eval=paper")
    if run.wandb.checkpoint and not run.runtime.save_checkpoint:
        raise ConfigError("wandb.checkpoint=true needs runtime.save_checkpoint=true")
    check_combination(run)


def _variant(composed: DictConfig, group: str) -> Any:
    """Build the value of a group whose `_target_` says which dataclass implements it."""
    node = composed[group]
    try:
        implementation = get_class(node["_target_"])
    except Exception as error:  # noqa: BLE001 (whatever the import of a named class raises)
        raise ConfigError(f"{group}._target_ names no class: {one_line(error)}") from None
    options = OmegaConf.masked_copy(node, [key for key in node if key != "_target_"])
    return typed_group(implementation, OmegaConf.create({group: options}), group)


def _evaluation(composed: DictConfig) -> Evaluation:
    evaluation = typed_group(Evaluation, composed, "eval")
    # One by one: a frozen dataclass inside a dict cannot be filled by a merge.
    texts = {
        name: typed_group(Dataset, composed.eval.texts, name, f"eval.texts.{name}")
        for name in evaluation.texts
    }
    return dataclasses.replace(evaluation, texts=texts)


def typed_group(cls: type[Value], composed: DictConfig, group: str, shown: str = "") -> Value:
    """Check one group against its dataclass and return the value."""
    shown = shown or group
    schema = OmegaConf.structured(cls)
    # Frozen dataclasses make read-only configs, which could not be filled.
    OmegaConf.set_readonly(schema, False)
    _unfreeze(schema)
    try:
        value = OmegaConf.to_object(OmegaConf.merge(schema, composed[group]))
    except ConfigKeyError as error:
        key, options = error.full_key, ", ".join(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        raise ConfigError(f"unknown option {shown}.{key}; options of {shown}: {options}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{shown}.{error.full_key}: {_first_line(error)}") from None
    assert isinstance(value, cls)
    return value


def _unfreeze(node: Any) -> None:
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    OmegaConf.set_readonly(node, False)
    for key in node:
        _unfreeze(node._get_node(key))


def _missing(node: Any, prefix: str) -> Iterator[str]:
    """Yield the options marked mandatory (???) that have no value."""
    if node == "???":
        yield prefix
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from _missing(value, f"{prefix}.{key}" if prefix else str(key))


def number(value: Any, name: str) -> float:
    """Return a number, or raise ConfigError naming the option."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value} is not a number")
    return float(value)


def _optional(value: Any, name: str) -> float | None:
    return None if value is None else number(value, name)


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of these overrides, Hydra's own node included.

    Raises:
        ConfigError: one line that names the option and what it may be.
    """
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", list(overrides), return_hydra_config=True)
    except HydraException as error:
        raise ConfigError(_explain(error, overrides)) from None
    # Hydra has plain ValueErrors too, for instance for a group set to null.
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(one_line(error)) from None


def _explain(error: HydraException, overrides: Sequence[str]) -> str:
    """Say which option was meant, and what its neighbours are called."""
    match = re.search(r"Could not override '([^']+)'", str(error))
    if match is None:
        return one_line(error).partition(" Config search path:")[0]
    parent, _, name = match[1].rpartition(".")
    groups = [o for o in overrides if "." not in o.split("=")[0] and not o.startswith(name + "=")]
    siblings = OmegaConf.select(compose(groups), parent) if parent else None
    where = f"options of {parent}" if isinstance(siblings, DictConfig) else "options"
    known = siblings if isinstance(siblings, DictConfig) else compose([])
    listed = ", ".join(str(k) for k in known if k not in ("hydra", "_target_")) or "none"
    return f"unknown option {match[1]}; {where}: {listed}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
