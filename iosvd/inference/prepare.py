"""Turn a compressed model into one that decodes fast, in place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from iosvd.errors import ConfigError, ModelError
from iosvd.inference.attention import GenerationAttention
from iosvd.inference.comparison import (
    calls_of,
    compare,
    context_of,
    embeddings_of,
    with_larger_inputs,
)
from iosvd.inference.packed import PackedMLP, unpack_
from iosvd.inference.positions import CallCheck
from iosvd.inference.rotary import RotaryTable
from iosvd.inference.structure import (
    attentions,
    can_be_latent,
    gated_mlps,
    rotary_table,
    unsupported_reason,
)
from iosvd.layers.replacement import compressed_layers
from iosvd.models.forward import evaluation, unless_refused
from iosvd.models.sites import decoder_of

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
Builder = Callable[[nn.Module], nn.Module]


class Cached(Enum):
    """Contents of the cache: keys or values themselves, or the latents of their projection."""

    full = "full"
    latent = "latent"


@dataclass(frozen=True)
class Inference:
    """How a compressed model generates; conf/inference."""

    packed: bool = True  # One product for the right factors that share an input.
    v_cache: Cached = Cached.full
    k_cache: Cached = Cached.full


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
        ConfigError: v_cache or k_cache is something else.
        ModelError: nothing is compressed, or attention is of another kind; the model is as before.
    """
    options = Inference(packed, _cached("v_cache", v_cache), _cached("k_cache", k_cache))
    if not compressed_layers(model):
        raise ModelError("the model is dense; compress it first, or load a compressed checkpoint")
    modules = attentions(model)
    _check_structure(model, modules)
    table = _table_for_keys(model) if options.k_cache is Cached.latent else None
    dtype = embeddings_of(model).dtype
    new_attention = partial(_attention, options=options, table=table, dtype=dtype)
    builders: dict[str, Builder] = dict.fromkeys(modules, new_attention)
    if options.packed:
        builders |= dict.fromkeys(gated_mlps(model), PackedMLP)
    with evaluation(model):
        _replace_(model, builders)
    model.requires_grad_(False).eval()
    decoder = decoder_of(model)
    check = CallCheck.of(decoder, latent_k=table is not None)
    decoder.register_forward_pre_hook(check, with_kwargs=True)
    _report(model)
    return model


def _cached(option: str, value: Cached | str) -> Cached:
    try:
        return Cached(value)
    except ValueError:
        raise ConfigError(f"{option}={value} is neither full nor latent") from None


def _replace_(model: PreTrainedModel, builders: Mapping[str, Builder]) -> None:
    """Put what is built in place of each module; if one computes something else, put all back."""
    modules = {name: model.get_submodule(name) for name in builders}
    calls = calls_of(model, modules)
    try:
        for name, call in calls.items():
            new = builders[name](modules[name]).eval()
            model.set_submodule(name, new)
            kind = type(modules[name]).__name__
            compare(new, name, kind, call)
            if (larger := with_larger_inputs(modules[name], call)) is not None:
                compare(new, name, kind, larger)
    except BaseException:
        for name, module in modules.items():
            model.set_submodule(name, module)
            unpack_(module)
        raise


def _attention(
    attention: nn.Module, options: Inference, table: RotaryTable | None, dtype: torch.dtype
) -> GenerationAttention:
    latent_k = table is not None and can_be_latent(attention.k_proj)  # type: ignore[arg-type]
    latent_v = options.v_cache is Cached.latent and can_be_latent(attention.v_proj)  # type: ignore[arg-type]
    kept = table if latent_k else None
    return GenerationAttention(
        attention, kept, packed=options.packed, latent_v=latent_v, dtype=dtype
    )


def _check_structure(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    if not modules:
        raise ModelError(
            f"no module of {type(model).__name__} has q_proj, k_proj, v_proj and o_proj; models"
            " with other attention generate as they are, without prepare_for_generation"
        )
    for name, attention in modules.items():
        if isinstance(attention, GenerationAttention):
            raise ModelError("the model is prepared for generation already; load it again")
        if reason := unsupported_reason(attention):
            raise ModelError(f"{name} ({type(attention).__name__}) {reason}; it cannot be prepared")
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ModelError(
            f"attention is {implementation}, which needs keys and values of one width; load the"
            " model with attn_implementation='sdpa'"
        )


def _table_for_keys(model: PreTrainedModel) -> RotaryTable:
    """Return the angles of keys by index in the cache; raise ModelError if they do not allow it."""
    table, reason = rotary_table(model), ""
    if _slides(model):
        reason = "attention slides, so that places in its cache move"
    elif table is None:
        reason = "rotary embeddings are not of one kind"
    else:
        like = embeddings_of(model)[:1, None]
        fixed = unless_refused(lambda: table.is_fixed(4 * context_of(model), like), "angles")
        if not fixed:
            reason = "rotary embeddings depend on more than one position per token"
    if reason or table is None:
        raise ModelError(f"the model's {reason}; use k_cache=full")
    return table


def _slides(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _report(model: nn.Module) -> None:
    modules = [m for m in model.modules() if isinstance(m, GenerationAttention)]
    keys, values = (sum(m.latent_k for m in modules), sum(m.latent_v for m in modules))
    log.info("latent keys in %d and latent values in %d of %d layers", keys, values, len(modules))
