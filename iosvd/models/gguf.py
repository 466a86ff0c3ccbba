"""Models in GGUF files: what transformers reads becomes an ordinary model.

GGUF holds weights in the number formats of llama.cpp. transformers dequantises them with the
package `gguf`, in the dtype that is asked for.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iosvd.errors import ModelError, extra, one_line
from iosvd.system.files import file_digest

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # Of llama.cpp.


@dataclass(frozen=True)
class GgufFile:
    """The GGUF file of a model, as a run records it."""

    name: str
    quantization: str  # The number format of most weights, for instance Q4_1.
    sha256: str


def make_ordinary_(model: PreTrainedModel) -> None:
    """Remove what tells of the file's number format: the weights no longer have it.

    transformers refuses to save the model otherwise.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def described(path: Path) -> GgufFile:
    """Return the name, number format and checksum of a file.

    Raises:
        MissingExtraError: the package gguf is not installed.
        ModelError: the file cannot be read.
    """
    return GgufFile(path.name, _header(path).quantization, file_digest(path))


def context_length(path: Path) -> int:
    """Return the context length of a file's model, in tokens.

    Raises:
        MissingExtraError: the package gguf is not installed.
        ModelError: the file cannot be read, or does not say.
    """
    if (context := _header(path).context) is None:
        raise ModelError(f"{path} does not name the model's context; set model.seq_len")
    return context


def gguf_in(folder: Path) -> str | None:
    """Return the name of the GGUF file in a folder that holds no other kind of model.

    Raises:
        ModelError: there are several, one model is divided among several, or it is a file itself.
    """
    if folder.suffix == ".gguf":
        raise ModelError(
            f"{folder} is a file; set model.path={folder.parent} model.gguf_file={folder.name}"
        )
    if (folder / "config.json").is_file():
        return None
    # Beside a model may lie the projector of its images.
    found = sorted(p.name for p in folder.glob("*.gguf") if not p.name.startswith("mmproj"))
    if parts := [name for name in found if _PART.search(name)]:
        raise ModelError(
            f"{folder} has a model in parts ({parts[0]}, …), which transformers cannot read; merge"
            " them with llama.cpp's gguf-split"
        )
    if len(found) > 1:
        raise ModelError(
            f"{folder} has {len(found)} GGUF files; choose one: model.gguf_file={found[0]}"
        )
    return found[0] if found else None


@dataclass(frozen=True)
class _Header:
    context: int | None  # Tokens.
    quantization: str


def _header(path: Path) -> _Header:
    if not path.is_file():
        raise ModelError(f"{path} does not exist; set model.path and model.gguf_file")
    stat = path.stat()
    return _parsed(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache  # Seconds, for the strings of the tokenizer.
def _parsed(path: Path, _size: int, _time: int) -> _Header:
    with extra("gguf"):
        from gguf import GGUFReader
    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        context = reader.fields.get(f"{architecture}.context_length")
        entries: Counter[str] = Counter()
        for tensor in reader.tensors:
            entries[tensor.tensor_type.name] += int(tensor.n_elements)
        return _Header(
            None if context is None else int(context.contents()), entries.most_common(1)[0][0]
        )
    # numpy and the reader raise many types for bytes that are no GGUF file, or a part of one.
    except Exception as error:
        raise ModelError(
            f"cannot read {path}: {one_line(error)[:200]}; it may be incomplete"
        ) from error
