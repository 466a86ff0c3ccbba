"""From OmegaConf nodes to the frozen dataclasses that implement them.

The dataclasses are the schemas, so no option is written twice.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from iosvd.errors import ConfigError, IosvdError, one_line

Value = TypeVar("Value")

# The default of `ratio`; a target_kl leaves none.
OmegaConf.register_new_resolver(
    "iosvd_ratio_unless", lambda target: 0.8 if target is None else None, replace=True
)
OmegaConf.register_new_resolver(
    "iosvd_below",
    lambda ratio, limit, then, otherwise: (
        then if ratio is not None and ratio < limit else otherwise
    ),
    replace=True,
)


def typed_group(cls: type[Value], composed: DictConfig, group: str, shown: str = "") -> Value:
    """Check one group of options against its dataclass and return the value.

    Args:
        cls: a frozen dataclass.
        composed: the node that holds the group.
        group: its key.
        shown: its name in error messages.

    Raises:
        ConfigError: an option is unknown, missing, of the wrong type or out of range.
    """
    shown = shown or group
    schema = OmegaConf.structured(cls)
    try:
        given = composed[group]
        _unfreeze(schema, given)
        value = OmegaConf.to_object(OmegaConf.merge(schema, given))
    except ConfigKeyError as error:
        key, options = error.full_key, ", ".join(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        raise ConfigError(f"unknown option {shown}.{key}; options of {shown}: {options}") from None
    except OmegaConfBaseException as error:
        known = own_error(error)
        raise known or ConfigError(f"{shown}.{error.full_key}: {first_line(error)}") from None
    assert isinstance(value, cls)
    return value


def variant(composed: DictConfig, group: str) -> Any:
    """Return the value of a group whose `_target_` names the dataclass that implements it.

    Raises:
        ConfigError: as `typed_group`, or `_target_` names no class.
    """
    try:
        node = composed[group]
        module, _, name = str(node["_target_"]).rpartition(".")
        implementation = getattr(importlib.import_module(module), name)
        if not dataclasses.is_dataclass(implementation) or not isinstance(implementation, type):
            raise TypeError(f"{name} is no dataclass")
    except Exception as error:  # noqa: BLE001 (importing a module may raise anything)
        raise ConfigError(f"{group}._target_ names no class: {one_line(error)}") from None
    options = OmegaConf.masked_copy(node, [key for key in node if key != "_target_"])
    return typed_group(implementation, OmegaConf.create({group: options}), group)


def number(value: Any, name: str) -> float:
    """Return a number, or raise ConfigError naming the option."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value} is not a number")
    return float(value)


def whole_number(value: Any, name: str) -> int:
    """Return a whole number, or raise ConfigError naming the option."""
    if number(value, name) != int(value):
        raise ConfigError(f"{name}={value} is not a whole number")
    return int(value)


def own_error(error: BaseException | None) -> IosvdError | None:
    """Return the error of ours behind one of OmegaConf, None if there is none: a resolver's."""
    while error is not None and not isinstance(error, IosvdError):
        error = error.__cause__ or error.__context__
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _unfreeze(node: Any, given: Any) -> None:
    """Let a schema be filled: frozen dataclasses make read-only nodes.

    An optional part that is given but has no value yet gets the schema of its dataclass.
    """
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    OmegaConf.set_readonly(node, False)
    given = given if isinstance(given, DictConfig) and not given._is_none() else OmegaConf.create()
    for key in node:
        part, wanted = node._get_node(key), given._get_node(key)
        if isinstance(part, DictConfig) and part._is_none() and isinstance(wanted, DictConfig):
            node[key] = None if wanted._is_none() else OmegaConf.structured(part._metadata.ref_type)
        _unfreeze(node._get_node(key), wanted)
