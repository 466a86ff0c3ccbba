"""JSON files, written completely or not at all, with checksums; reading trusts nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from iosvd.errors import StorageError
from iosvd.system.files import write_text

Value = TypeVar("Value")
_SEALED = re.compile(r'(.*),\n "sha256": "([0-9a-f]{64})"\n}\n', flags=re.DOTALL)


class DamagedError(ValueError):
    """A file is damaged or of another version."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedError: the file is not text, not JSON, not an object, too deeply nested, or holds NaN
            or infinity.
        OSError: it cannot be read.
    """
    return _parse(_text(path), path)


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a file of `write_sealed`, check it, and return it without its checksum.

    Raises:
        DamagedError: the checksum does not match, or as `read_json`.
        OSError: it cannot be read.
    """
    found = _SEALED.fullmatch(_text(path))
    if found is None:
        raise DamagedError(f"{path} has no checksum")
    body = found[1] + "\n}"
    if hashlib.sha256(body.encode()).hexdigest() != found[2]:
        raise DamagedError(f"{path} does not match its checksum")
    return _parse(body, path)


def to_json(value: Any) -> Any:
    """Return a value of options as JSON: dataclasses as objects, members of an Enum as values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inside) for inside in value]
    return value.value if isinstance(value, Enum) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file completely or not at all.

    Raises:
        StorageError: a number is NaN or infinite, which JSON cannot express.
    """
    write_text(path, _json(path, value) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whose last entry is the checksum of everything before it."""
    body = _json(path, value)
    seal = hashlib.sha256(body.encode()).hexdigest()
    write_text(path, body.removesuffix("\n}") + f',\n "sha256": "{seal}"\n}}\n')


def _json(path: Path, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, indent=1, allow_nan=False)
    except ValueError as error:
        raise StorageError(f"{path} would hold NaN or infinity: {error}") from error


def typed(cls: type[Value], value: Any, where: str) -> Value:
    """Return JSON as a dataclass, whose fields are checked recursively.

    Args:
        cls: a dataclass of numbers, texts, mappings, lists and such dataclasses.
        value: the result of `read_json`. Keys without a field are ignored.
        where: its name in errors.

    Raises:
        DamagedError: a field is missing or of another type; it is named.
    """
    return typing.cast(Value, _typed(cls, value, where))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is not text") from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise DamagedError(f"{path} is nested too deep") from None
    except ValueError as error:
        raise DamagedError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path} holds {_shown(value)}, not an object")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _typed(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    options, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        (rest,) = [option for option in options if option is not type(None)]
        return _typed(rest, value, where)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _typed(options[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_typed(options[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value, where)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    expected = kind.__name__ if origin is None else origin.__name__
    raise DamagedError(f"{where} is {_shown(value)}, not {expected}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise DamagedError(f"{where} is {_shown(value)}, not an object")
    hints, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            place = f"{where}.{field.name}"
            found[field.name] = _typed(hints[field.name], value[field.name], place)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise DamagedError(f"{where} has no {field.name}")
    return kind(**found)


def _number(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise DamagedError(f"{where} is too large a number") from None


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:40]
