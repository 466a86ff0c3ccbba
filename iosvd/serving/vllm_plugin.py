"""A plugin for vLLM that serves compressed checkpoints without densifying them.

vLLM finds it by the entry point `vllm.general_plugins` once both are installed; no further set-up.
One GPU per model; factors in the model's dtype; vLLM keeps its own KV cache.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from iosvd.errors import CheckpointError
from iosvd.layers.folder import METHOD


def register() -> None:
    """Teach vLLM the checkpoints; it calls this in every process, maybe more than once."""
    known: Any = import_module("vllm.model_executor.layers.quantization")
    if METHOD not in known.QUANTIZATION_METHODS:
        import_module("iosvd.serving.vllm_layers")


def checked_ranks(config: dict[str, Any]) -> dict[str, int]:
    """Return the ranks of a checkpoint's `quantization_config`.

    Raises:
        CheckpointError: something else than ranks is compressed.
    """
    if others := [name for name in ("rows", "four_bit", "biases", "form") if config.get(name)]:
        raise CheckpointError(
            f"the checkpoint has {others[0]} beside factors, which are not served; export it with"
            " iosvd.export_dense, or compress with quantization=none and correction.bias=false"
        )
    ranks = dict(config["ranks"])
    if experts := [name for name in ranks if ".experts." in name]:
        raise CheckpointError(
            f"{experts[0]} is an expert, which the server keeps in another form; export the model"
            " with iosvd.export_dense"
        )
    return ranks


def ranks_of(name: str, ranks: dict[str, int], packed: dict[str, list[str]]) -> list[int | None]:
    """Return the rank of every layer that a layer of the server stands for; None: dense."""
    parent, _, last = name.rpartition(".")
    parts = packed.get(last, [last])
    return [ranks.get(f"{parent}.{part}" if parent else part) for part in parts]
