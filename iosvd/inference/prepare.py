"""Turn a compressed model into one that decodes fast, in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iosvd.errors import ModelError, one_line
from iosvd.inference.attention import GenerationAttention
from iosvd.inference.packed import PackedMLP
from iosvd.inference.rotary import RotaryTable
from iosvd.inference.structure import (
    attentions,
    can_be_latent,
    gated_mlps,
    reason_against,
    rotary_table,
)
from iosvd.layers.replacement import compressed_layers
from iosvd.models.forward import evaluation, output_of, unless_refused

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
_TOKENS = 8  # Of the call that compares a module with what takes its place.
_UNNAMED = 2048  # Tokens of a context, if the configuration names no length.
# The largest difference from the module's output, relative to its largest entry.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.05  # In 16 bits.
_LOUDER = 8.0


class Cached(Enum):
    """What is cached of keys or values: themselves, or the latents of their projection."""

    full = "full"
    latent = "latent"


@dataclass(frozen=True)
class Inference:
    """How a compressed model generates; conf/inference."""

    packed: bool = True  # One product for the right factors that share an input.
    v_cache: Cached = Cached.full
    k_cache: Cached = Cached.full


@dataclass(frozen=True)
class Call:
    """A call of a module with 8 tokens at the end of the context, and what it returned."""

    hidden: Tensor
    options: Mapping[str, Any]
    output: Tensor


def prepare_for_generation(
    model: PreTrainedModel,
    v_cache: Cached | str = Cached.full,
    k_cache: Cached | str = Cached.full,
    packed: bool = True,
) -> PreTrainedModel:
    """Pack the factors of a compressed model and let it cache latents, in place.

    The checkpoint stays what it is: names and values of all tensors are the same. The model is in
    evaluation mode afterwards and takes no gradients. Sites that are dense are cached as usual.

    Args:
        model: a compressed causal language model whose attention modules have q, k, v and o
            projections and rotary embeddings after them.
        v_cache: "full" or "latent".
        k_cache: "full" or "latent"; latent keys are rebuilt and rotated at every step.
        packed: whether right factors with the same input become one product.

    Returns:
        The model.

    Raises:
        ModelError: nothing is compressed, or attention is of another kind; the model is as before.
    """
    options = Inference(packed, Cached(v_cache), Cached(k_cache))
    if not compressed_layers(model):
        raise ModelError("the model is dense; compress it first, or load a compressed checkpoint")
    found = attentions(model)
    _check_structure(model, found, options)
    table = rotary_table(model) if options.k_cache is Cached.latent else None
    mlps = gated_mlps(model) if options.packed else {}
    model.requires_grad_(False).eval()
    calls = _calls(model, {**found, **mlps})
    built = partial(_attention, options=options, table=table, dtype=_embeddings(model).dtype)
    done: dict[str, nn.Module] = {}
    try:
        for name, module in {**found, **mlps}.items():
            new = PackedMLP(module) if name in mlps else built(module)
            done[name] = module
            model.set_submodule(name, new)
            for call in (calls[name], *_louder(module, calls[name])):
                _compare(new, name, type(module).__name__, call)
    except ModelError:
        for name, module in done.items():
            model.set_submodule(name, module)
        raise
    if table is not None:
        model.register_forward_pre_hook(_check_positions, with_kwargs=True)
    _report(model)
    return model


def _attention(
    attention: nn.Module, options: Inference, table: RotaryTable | None, dtype: torch.dtype
) -> GenerationAttention:
    latent_k = table is not None and can_be_latent(attention.k_proj)  # type: ignore[arg-type]
    latent_v = options.v_cache is Cached.latent and can_be_latent(attention.v_proj)  # type: ignore[arg-type]
    kept = table if latent_k else None
    return GenerationAttention(
        attention, kept, packed=options.packed, latent_v=latent_v, dtype=dtype
    )


def _check_structure(
    model: PreTrainedModel, found: Mapping[str, nn.Module], options: Inference
) -> None:
    if not found:
        raise ModelError(
            f"no module of {type(model).__name__} has q_proj, k_proj, v_proj and o_proj; models"
            " with other attention generate as they are, without prepare_for_generation"
        )
    for name, attention in found.items():
        if isinstance(attention, GenerationAttention):
            raise ModelError("the model is prepared for generation already; load it again")
        if reason := reason_against(attention):
            raise ModelError(f"{name} ({type(attention).__name__}) {reason}; it cannot be prepared")
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ModelError(
            f"attention is {implementation}, which needs keys and values of one width; load the"
            " model with attn_implementation='sdpa'"
        )
    if options.k_cache is Cached.latent:
        _check_places(model)


def _check_places(model: PreTrainedModel) -> None:
    """Raise ModelError unless keys can be rotated by their place in a cache."""
    table, reason = rotary_table(model), ""
    if _slides(model):
        reason = "attention slides, so that places in its cache move"
    elif table is None:
        reason = "rotary embeddings are not of one kind"
    else:
        like = _embeddings(model)[:1, None]
        fixed = unless_refused(lambda: table.is_fixed(4 * _context(model), like), "angles")
        if not fixed:
            reason = "rotary embeddings depend on more than one position per token"
    if reason:
        raise ModelError(f"the model's {reason}; use k_cache=full")


def _embeddings(model: PreTrainedModel) -> Tensor:
    """Return the embeddings (vocabulary, d), in the dtype and on the device of hidden states."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _context(model: PreTrainedModel) -> int:
    """Return the longest context, in tokens."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or _UNNAMED


def _slides(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _calls(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, Call]:
    """Call the model at the end of its context; keep what each module got and returned."""
    calls: dict[str, Call] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            calls[name] = Call(hidden, rest, output_of(output))

        return modules[name].register_forward_hook(keep, with_kwargs=True)

    vocabulary = len(_embeddings(model))
    tokens = torch.arange(_TOKENS, device=model.device)[None]
    hooks = [hook(name) for name in modules]
    try:
        with evaluation(model):
            model(
                input_ids=tokens % vocabulary,
                position_ids=tokens + max(0, _context(model) - _TOKENS),
                use_cache=False,
            )
    finally:
        for handle in hooks:
            handle.remove()
    return calls


def _louder(module: nn.Module, call: Call) -> list[Call]:
    """Return the call with larger inputs, which show a cap on scores; 16 bits cannot tell."""
    if call.output.dtype not in _TOLERANCE:
        return []
    hidden = _LOUDER * call.hidden
    with torch.no_grad():
        return [Call(hidden, call.options, output_of(module(hidden, **call.options)))]


def _compare(module: nn.Module, name: str, kind: str, call: Call) -> None:
    """Raise ModelError unless a new module returns what the module in its place did."""
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
    if not difference <= _TOLERANCE.get(call.output.dtype, _HALF_TOLERANCE) * largest:
        raise ModelError(
            f"{name} ({kind}) computes more than its projections and rotary embeddings say: what"
            f" takes its place differs by {difference / max(largest, 1e-30):.2g}; it cannot be"
            " prepared for generation"
        )


def _in_two(module: GenerationAttention, call: Call) -> Tensor:
    """Return the outputs of all tokens but the last, then of the last with a cache."""
    from transformers import DynamicCache

    options = {**call.options, "past_key_values": DynamicCache()}
    mask, angles = options.pop("attention_mask", None), options.pop("position_embeddings")
    outputs = []
    # An index of its own: the new cache has no other layers.
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


def _check_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ModelError for positions that do not advance as places in a cache do."""
    positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
    if positions is None or positions.shape[-1] < 2 or torch.compiler.is_compiling():
        return
    past = 0 if cache is None else int(cache.get_seq_length())
    steps = positions.diff(dim=-1) == 1
    visible = _visible(kwargs.get("attention_mask"), past, positions.shape[-1] - 1)
    if visible is not None:
        steps = steps | ~visible
    if not bool(steps.all()):
        raise ModelError(
            "positions of a prompt do not advance by one, so that latent keys cannot be rotated by"
            " their place; pad on the left (padding_side='left'), or use k_cache=full"
        )


def _visible(mask: Any, past: int, count: int) -> Tensor | None:
    """Return which of `count` new tokens (batch, count) the last one of a prompt sees."""
    if isinstance(mask, dict):  # By kind of layer.
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if mask.dim() == 4:  # (batch, 1, queries, keys), true or 0 where a key is seen.
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    return mask[:, past : past + count].bool()  # type: ignore[no-any-return]


def _report(model: nn.Module) -> None:
    modules = [m for m in model.modules() if isinstance(m, GenerationAttention)]
    keys, values = (sum(m.latent_k for m in modules), sum(m.latent_v for m in modules))
    log.info("latent keys in %d and latent values in %d of %d layers", keys, values, len(modules))
