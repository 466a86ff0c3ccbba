"""Whether the weights that were loaded are those of the architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from iosvd.errors import ModelError

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


def check_complete(loaded: PreTrainedModel, found: Mapping[str, Any], source: str) -> None:
    """Raise ModelError unless the weights are those of the architecture, all and no others."""
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random.
        raise ModelError(
            f"the model in {source} lacks {len(missing)} weights, for instance {missing[0]}; it may"
            " be incomplete"
        )
    known = {name for name, _ in loaded.named_parameters()} | set(found["unexpected_keys"])
    unexpected = [key for key in sorted(found["unexpected_keys"]) if not _is_computed(key, known)]
    if unexpected:  # It would leave them out.
        raise ModelError(
            f"the model in {source} has {len(unexpected)} weights that"
            f" {type(loaded).__name__} has no place for, for instance {unexpected[0]}; its"
            " config.json may name another architecture"
        )


def _is_computed(key: str, known: Iterable[str]) -> bool:
    """Whether a tensor of an old file is a mask or a frequency, which models compute today."""
    place, _, name = key.rpartition(".")
    weighs = any(other.endswith(f"{place}.weight") for other in known)
    return name in ("bias", "masked_bias", "causal_mask", "inv_freq") and not weighs
