"""Check by one call that a replacement computes what the original module did.

Comparing outputs needs no list of architectures: any cap, gate or scale shows in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iosvd.errors import ModelError, one_line
from iosvd.inference.attention import GenerationAttention
from iosvd.models.forward import evaluation, output_of

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

_TOKENS = 8  # Of the call that compares a module with what takes its place.
_UNNAMED = 2048  # Tokens of a context, if the configuration names no length.
# In float64 too: transformers computes the angles of rotary embeddings in float32.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.05  # In 16 bits.
_INPUT_SCALE = 8.0
_SCALED_TOLERANCE = 0.01  # Scores are 64 times as large, and so is their rounding.


@dataclass(frozen=True)
class Call:
    """One call of a module, with eight tokens at the end of the context, and its output."""

    hidden: Tensor
    options: Mapping[str, Any]
    output: Tensor
    tolerance: float  # The largest difference from the output, relative to its largest entry.


def embeddings_of(model: PreTrainedModel) -> Tensor:
    """Return the embeddings (vocabulary, d), in the dtype and on the device of hidden states."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def context_of(model: PreTrainedModel) -> int:
    """Return the longest context, in tokens."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or _UNNAMED


def calls_of(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, Call]:
    """Run the model on eight tokens at the end of its context; record what these modules do."""
    calls: dict[str, Call] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            found = output_of(output)
            tolerance = _TOLERANCE.get(found.dtype, _HALF_TOLERANCE)
            calls[name] = Call(hidden, rest, found, tolerance)

        return modules[name].register_forward_hook(keep, with_kwargs=True)

    vocabulary = len(embeddings_of(model))
    tokens = torch.arange(_TOKENS, device=model.device)[None]
    hooks = [hook(name) for name in modules]
    try:
        with evaluation(model):
            model(
                input_ids=tokens % vocabulary,
                position_ids=tokens + max(0, context_of(model) - _TOKENS),
                use_cache=False,
            )
    finally:
        for handle in hooks:
            handle.remove()
    return calls


def with_larger_inputs(module: nn.Module, call: Call) -> Call | None:
    """Repeat a call with larger inputs, which reveal a cap on scores; None in 16 bits."""
    if call.output.dtype not in _TOLERANCE:
        return None
    hidden = _INPUT_SCALE * call.hidden
    with torch.no_grad():
        found = output_of(module(hidden, **call.options))
        return Call(hidden, call.options, found, _SCALED_TOLERANCE)


def compare(module: nn.Module, name: str, kind: str, call: Call) -> None:
    """Raise ModelError unless the replacement returns the recorded output."""
    with torch.no_grad():
        try:
            found = [output_of(module(call.hidden, **call.options))]
            if isinstance(module, GenerationAttention):
                found.append(_in_two(module, call))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"{name} ({kind}) cannot be prepared for generation: {one_line(error)}"
            ) from error
    largest = float(call.output.abs().max())
    difference = max(float((each - call.output).abs().max()) for each in found)
    if not difference <= call.tolerance * largest:
        raise ModelError(
            f"{name} ({kind}) computes more than its projections and rotary embeddings say: what"
            f" takes its place differs by {difference / max(largest, 1e-30):.2g}; it cannot be"
            " prepared for generation"
        )


def _in_two(module: GenerationAttention, call: Call) -> Tensor:
    """Compute all tokens but the last, then the last one from a cache; return all outputs."""
    from transformers import DynamicCache

    options = {**call.options, "past_key_values": DynamicCache()}
    mask, angles = options.pop("attention_mask", None), options.pop("position_embeddings")
    outputs = []
    # The new cache has one layer.
    index, module.layer_idx = module.layer_idx, 0
    try:
        for part in (slice(0, -1), slice(-1, None)):
            outputs.append(
                module(
                    call.hidden[:, part],
                    position_embeddings=tuple(angle[:, part] for angle in angles),
                    attention_mask=None if mask is None else mask[..., part, : part.stop],
                    **options,
                )[0]
            )
    finally:
        module.layer_idx = index
    return torch.cat(outputs, dim=1)
