"""Models in GGUF files: what transformers reads becomes an ordinary model.

GGUF holds weights in the number formats of llama.cpp. transformers dequantises them with the
package `gguf`, in the dtype that is asked for.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iosvd.errors import ModelError, extra, one_line
from iosvd.system.files import blocks_of

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GgufFile:
    """What a record says about the file that a model came from."""

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
    entries: Counter[str] = Counter()
    for tensor in _reader(path).tensors:
        entries[tensor.tensor_type.name] += int(tensor.n_elements)
    total = hashlib.sha256()
    for block in blocks_of(path):
        total.update(block)
    return GgufFile(path.name, entries.most_common(1)[0][0], total.hexdigest())


def context_length(path: Path) -> int:
    """Return the context length of a file's model, in tokens.

    Raises:
        MissingExtraError: the package gguf is not installed.
        ModelError: the file cannot be read, or does not say.
    """
    fields = _reader(path).fields
    try:
        architecture = fields["general.architecture"].contents()
        return int(fields[f"{architecture}.context_length"].contents())
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path} does not name the model's context; set model.seq_len") from None


def gguf_in(folder: Path) -> str | None:
    """Return the name of the GGUF file in a folder that holds no other kind of model.

    Raises:
        ModelError: there are several.
    """
    if (folder / "config.json").is_file():
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) > 1:
        raise ModelError(
            f"{folder} has {len(found)} GGUF files; choose one: model.gguf_file={found[0]}"
        )
    return found[0] if found else None


@functools.lru_cache(maxsize=1)  # Seconds, for the strings of the tokenizer.
def _reader(path: Path) -> Any:
    with extra("gguf"):
        from gguf import GGUFReader
    if not path.is_file():
        raise ModelError(f"{path} does not exist; set model.path and model.gguf_file")
    try:
        return GGUFReader(path)
    # numpy and the reader raise many types for bytes that are no GGUF file, or a part of one.
    except Exception as error:
        raise ModelError(
            f"cannot read {path}: {one_line(error)[:200]}; it may be incomplete"
        ) from error
