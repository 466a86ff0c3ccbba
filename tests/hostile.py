"""Ways in which somebody else's files can be wrong, each a change of a good folder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "x" * 5_000
TERMINAL = "\x1b[31mred\x1b[0m\nsecond line"
NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "[]", "null", '"0.5"', "true", DEEP)


@dataclass(frozen=True)
class Change:
    """One change of a folder, and what it is called in a test's name."""

    name: str
    apply: Callable[[Path], None]

    def __str__(self) -> str:
        return self.name


class Raw(str):
    """A piece of JSON that `json` would not write."""


def dumped(value: Any) -> str:
    """Write JSON as our files have it, with raw pieces in it."""
    pieces: list[str] = []

    def placed(item: Any) -> Any:
        if isinstance(item, Raw):
            pieces.append(str(item))
            return f"\0{len(pieces) - 1}\0"
        if isinstance(item, dict):
            return {key: placed(inner) for key, inner in item.items()}
        return [placed(inner) for inner in item] if isinstance(item, list) else item

    text = json.dumps(placed(value), indent=1)
    for number, piece in enumerate(pieces):
        text = text.replace(f'"\\u0000{number}\\u0000"', piece)
    return text


def seal(body: str) -> str:
    """Add the checksum that our own records have: whoever forges a record can do that too."""
    digest = hashlib.sha256(body.encode()).hexdigest()
    return body.removesuffix("\n}") + f',\n "sha256": "{digest}"\n}}\n'


def changed_json(file: str, path: str, value: Any, sealed: bool = False) -> Callable[[Path], None]:
    """Return what gives one value of a JSON file another one; `...` removes it."""

    def apply(folder: Path) -> None:
        whole = json.loads((folder / file).read_text())
        whole.pop("sha256", None)
        node, keys = whole, path.split("/")
        for key in keys[:-1]:
            node = node[_key(node, key)]
        if value is ...:
            del node[_key(node, keys[-1])]
        else:
            node[_key(node, keys[-1])] = value
        text = dumped(whole)
        (folder / file).write_text(seal(text) if sealed else text)

    return apply


def _key(node: dict[str, Any], key: str) -> str:
    return next(iter(node)) if key == "*" else key


def replaced(file: str, content: str | bytes) -> Callable[[Path], None]:
    """Return what gives a file other content."""

    def apply(folder: Path) -> None:
        raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / file).write_bytes(raw)

    return apply


def linked(file: str, target: Path) -> Callable[[Path], None]:
    """Return what puts a link in a file's or folder's place."""

    def apply(folder: Path) -> None:
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target)

    return apply


def with_tensor(part: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Return what changes the first tensor whose name ends so; None removes it."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        name = next(n for n in sorted(tensors) if n.endswith(part))
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()
        save_file(tensors, path, metadata=metadata)

    return apply


def tree(folder: Path) -> dict[str, Any]:
    """Return all that lies in a folder: links with where they lead, files with their content."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def sentinels(folder: Path) -> Path:
    """Make a tree of somebody's own files."""
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "cat.png").write_bytes(b"\x89PNG")
    (folder / "mail.txt").write_text("Dear Sir")
    (folder / "statistics").mkdir()
    (folder / "statistics" / "thesis.csv").write_text("1,2")
    return folder


def checkpoint_changes(outside: Path) -> Iterator[Change]:
    """Yield changes of a checkpoint with factors and dense weights, in rows of two widths.

    Args:
        outside: a folder of somebody's own files.
    """
    yield from _of_types()
    yield from _of_values()
    yield from _of_config()
    yield from _of_files(outside)


def _of_types() -> Iterator[Change]:
    exact = ("weight_int8", "weight_scale", "weight_order", "left_int8", "left_scale")
    others = (torch.float32, torch.uint8, torch.bool, torch.int8, torch.int32)
    mine = {"int8": torch.int8, "scale": torch.float16, "order": torch.int16}
    for part in exact:
        for dtype in others:
            if dtype is not mine[part.rpartition("_")[2]]:
                yield Change(f"{part} as {dtype}", with_tensor(part, lambda t, d=dtype: t.to(d)))
    for part in ("proj.weight", "proj.left"):
        for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8):
            yield Change(f"{part} as {dtype}", with_tensor(part, lambda t, d=dtype: t.to(d)))
        yield Change(f"{part} as float64", with_tensor(part, lambda t: t.double()))


def _of_values() -> Iterator[Change]:
    def first(value: float) -> Callable[[Tensor], Tensor]:
        def change(tensor: Tensor) -> Tensor:
            tensor.view(-1)[0] = value
            return tensor

        return change

    for part in ("proj.weight", "proj.left", "_scale", "norm.weight", "embed_tokens.weight"):
        for value in (math.nan, math.inf, -math.inf):
            yield Change(f"{part} with {value}", with_tensor(part, first(value)))
    for value in (-1, 1, 999):
        yield Change(f"order with {value}", with_tensor("_order", first(value)))
    yield Change("negative scale", with_tensor("_scale", lambda t: -t - 1))
    yield Change("a column less", with_tensor("proj.weight", lambda t: t[:, 1:]))
    yield Change("transposed", with_tensor("proj.left", lambda t: t.T))
    yield Change("without order", with_tensor("_order", lambda t: None))
    yield Change("without factor", with_tensor("proj.left", lambda t: None))


def _of_config() -> Iterator[Change]:
    def config(name: str, path: str, value: Any) -> Change:
        return Change(name, changed_json("config.json", f"quantization_config/{path}", value))

    for value in (*map(Raw, NOT_NUMBERS), 0, -1, 10**6, 10**400, 1.5, LONG, {}):
        shown = str(value)[:12]
        yield config(f"rank {shown}", "ranks/*", value)
    for value in ([], None, "3", 7, [[1]], Raw(DEEP), ...):
        yield config(f"ranks {str(value)[:12]}", "ranks", value)
    for name in ("model.layers.9.mlp.up_proj", "../../etc/passwd", LONG, TERMINAL, "", "lm_head.x"):
        yield config(f"ranks of {name[:12]!r}", "ranks", {name: 2})
    for value in ([], "x", 1, {"weight": []}, {"weight": {}}, Raw(DEEP)):
        yield config(f"rows {str(value)[:12]}", "rows/*", value)
    for key, values in (
        ("int8", ("1", -1, 10**9, True, None, 1.0)),
        ("by_output", (1, "yes", None)),
        ("ordered", (0, "no", [])),
        ("code", ("linear\n", 1, None, "dynamic2")),
    ):
        for value in values:
            yield config(f"{key} {value!r}", f"rows/*/*/{key}", value)
    for value in (0, -3, "64", [], None):
        yield config(f"four_bit {value!r}", "four_bit", {"model.layers.0.mlp.up_proj": value})
    yield config("biases are a text", "biases", "model.layers.0.mlp.up_proj")
    yield config("biases are numbers", "biases", [1, 2])
    yield config("another method", "quant_method", "no_such_method")


def _of_files(outside: Path) -> Iterator[Change]:
    yield Change("empty weights", replaced("model.safetensors", b""))
    yield Change("weights are text", replaced("model.safetensors", b"hello" * 100))
    huge = (2**60).to_bytes(8, "little") + b"{}"
    yield Change("a header of an exabyte", replaced("model.safetensors", huge))
    header = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 999999]}}'
    short = len(header).to_bytes(8, "little") + header
    yield Change("offsets beyond the end", replaced("model.safetensors", short))
    yield Change("config is empty", replaced("config.json", ""))
    yield Change("config is a list", replaced("config.json", "[]"))
    yield Change("config is deep", replaced("config.json", DEEP))
    yield Change("config is no text", replaced("config.json", b"\xff\xfe\x00"))
    yield Change("weights are somebody's", linked("model.safetensors", outside / "mail.txt"))
    yield Change("weights lead nowhere", linked("model.safetensors", outside / "gone"))
    yield Change("weights are a folder", linked("model.safetensors", outside / "photos"))
    yield Change("config is somebody's", linked("config.json", outside / "mail.txt"))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside/mail.txt"}}

    def sharded(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    yield Change("an index that leads out", sharded)


def run_changes(outside: Path) -> Iterator[Change]:
    """Yield changes of a complete run's folder.

    Args:
        outside: a folder of somebody's own files.
    """
    for value in map(Raw, ("NaN", "1e999", "[]", "true", DEEP)):
        change = changed_json("metrics.json", "perplexity/*", value, sealed=True)
        yield Change(f"a perplexity of {value[:9]}", change)
    for path in ("ratio", "target_bytes", "compression_seconds"):
        for raw in ("NaN", "[]"):
            change = changed_json("metrics.json", path, Raw(raw), sealed=True)
            yield Change(f"{path} is {raw}", change)
    change = changed_json("metrics.json", "target_bytes", 10**400, sealed=True)
    yield Change("target_bytes is huge", change)
    for path in ("digest", "label", "config", "config/eval/texts", "zero_shot", "started"):
        for value in (..., [1]):
            change = changed_json("metrics.json", path, value, sealed=True)
            yield Change(f"{path} is {str(value)[:8]}", change)
    for text in (TERMINAL, LONG, "</script><!--<script>", "| a | b\n\\input{x}", "\ud800"):
        change = changed_json("metrics.json", "label", text, sealed=True)
        yield Change(f"label says {text[:8]!r}", change)
    for file in ("metrics.json", "plan.json"):
        for content in ("[]", DEEP, "\ud800"):
            yield Change(f"{file} is {content[:5]!r}", replaced(file, content))
    for path in ("sites", "sites/*/rank", "sites/*/out_features"):
        for value in (Raw("NaN"), 0, 10**400, ...):
            change = changed_json("plan.json", path, value)
            yield Change(f"plan's {path} is {str(value)[:6]}", change)
    names = {"²": "a power", "7" * 5000: "a long number", TERMINAL: "escapes"}
    for name, shown in names.items():
        yield Change(f"a site named by {shown}", _renamed_site(f"model.layers.{name}.up_proj"))
    yield Change("spectra are text", replaced("spectra.safetensors", b"hello"))
    yield Change("spectra are somebody's", linked("spectra.safetensors", outside / "mail.txt"))
    yield Change("metrics are somebody's", linked("metrics.json", outside / "mail.txt"))
    yield Change("plan is a folder", linked("plan.json", outside / "photos"))
    yield Change("failed without a record", _failed("[]"))
    yield Change("failed with null", _failed("null"))
    yield Change("failed deeply", _failed(DEEP))
    yield Change("failed with escapes", _failed(json.dumps({"error": TERMINAL, "traceback": ""})))
    yield Change("failed with a number", _failed('{"error": 3, "traceback": ""}'))
    yield Change("failed without reason", _failed("{}"))


def _renamed_site(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        plan["sites"][name] = plan["sites"].pop(next(iter(plan["sites"])))
        (folder / "plan.json").write_text(json.dumps(plan))

    return apply


def _failed(record: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "metrics.json").unlink()
        (folder / "failure.json").write_text(record)

    return apply
