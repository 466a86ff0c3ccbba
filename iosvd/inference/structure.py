"""Find the attention and MLP modules that can be prepared for generation, by their structure.

Structure shows what a module should compute; `comparison.py` checks that it computes nothing else.
"""

from __future__ import annotations

import inspect

from torch import nn

from iosvd.inference.rotary import RotaryTable
from iosvd.layers.modules import LowRankLinear
from iosvd.models.sites import decoder_of

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ATTRIBUTES = ("config", "layer_idx", "head_dim", "scaling")
_ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
_NORMS = ("q_norm", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the language model's modules with q, k, v and o projections, by name and in order."""
    inside = set(decoder_of(model).modules())
    named = model.named_modules()
    return {n: m for n, m in named if m in inside and _has_layers(m, _PROJECTIONS)}


def gated_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the language model's modules of gate, up and down projections and an activation."""
    inside, mlps = set(decoder_of(model).modules()), {}
    for name, module in model.named_modules():
        layers = {n for n, child in module.named_children() if isinstance(child, nn.Linear)}
        if module in inside and layers == set(_MLP) and hasattr(module, "act_fn"):
            mlps[name] = module
    return mlps


def unsupported_reason(attention: nn.Module) -> str | None:
    """Return why an attention module cannot be replaced; None if its structure allows it."""
    if missing := [name for name in _ATTRIBUTES if not hasattr(attention, name)]:
        return f"has no {missing[0]}"
    accepted = inspect.signature(attention.forward).parameters
    if missing := [name for name in _ARGUMENTS if name not in accepted]:
        return f"is not called with {missing[0]}"
    known = {*_PROJECTIONS, *_NORMS}
    parts = {name.partition(".")[0] for name, _ in attention.named_parameters()}
    if others := sorted(parts - known):
        return f"has {others[0]} beside its projections"
    if capped := [name for name, value in vars(attention).items() if "softcap" in name and value]:
        return f"caps its scores ({capped[0]})"
    head: int = attention.head_dim  # type: ignore[assignment]
    for name in _PROJECTIONS[:3]:
        if attention.get_submodule(name).out_features % head:  # type: ignore[operator]
            return f"has a {name} that is no whole number of heads"
    for name in _NORMS:
        norm = getattr(attention, name, None)
        sizes = {p.numel() for p in norm.parameters()} if norm is not None else set()
        if sizes - {head}:
            return f"normalises with {name} over more than a head"
    return None


def rotary_table(model: nn.Module) -> RotaryTable | None:
    """Return the table of a model's rotary embeddings; None if there are none, or several kinds."""
    embeddings = [
        module
        for module in decoder_of(model).modules()
        if "inv_freq" in dict(module.named_buffers(recurse=False))
    ]
    return RotaryTable(embeddings[0]) if len(embeddings) == 1 else None


def can_be_latent(layer: nn.Module) -> bool:
    """Whether a projection's latent is smaller than its output."""
    return isinstance(layer, LowRankLinear) and layer.rank < layer.out_features


def _has_layers(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)
