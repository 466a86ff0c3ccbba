"""Tell the checkpoint of a compressed model from others, without importing transformers."""

from __future__ import annotations

from pathlib import Path

from iosvd.system.json_files import read_json

METHOD = "iosvd"  # The quant_method of config.json.


def is_compressed(folder: Path | None) -> bool:
    """Whether a folder holds a checkpoint of a compressed model."""
    path = None if folder is None else folder / "config.json"
    if path is None or not path.is_file():
        return False
    described = read_json(path).get("quantization_config")
    return isinstance(described, dict) and described.get("quant_method") == METHOD
