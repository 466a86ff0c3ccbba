"""Give queries, keys and values other forms of linear layers, so that these can be sites.

QSVD factorises the three of an attention module together, with one right factor, whose latent
serves keys and values alike; WSVD factorises every head alone. Both compute what three layers do.
"""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from iosvd.errors import ModelError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
JOINT = "qkv_proj"


class Form(Enum):
    """Which linear layers make queries, keys and values."""

    separate = "separate"  # One each, as the architecture has them.
    joint = "joint"  # One for all three: `qkv_proj`.
    heads = "heads"  # One for each head: q_proj.0, q_proj.1, …


class _Shared:
    """The output of an attention module's joint layer, until all three parts have been read."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._read: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        copied = memo[id(self)] = _Shared(self.attention)
        copied.attention = copy.deepcopy(self.attention, memo)
        return copied

    def output(self, x: Tensor, reader: str) -> Tensor:
        """Return the layer's output; it computes once for the three readers of one tensor."""
        if self._input is not x or reader in self._read or self._output is None:
            self._input, self._output, self._read = x, self.attention.get_submodule(JOINT)(x), set()
        self._read.add(reader)
        found = self._output
        assert found is not None
        if len(self._read) == len(PROJECTIONS):
            self._input = self._output = None
        return found


class Part(nn.Module):
    """The queries, keys or values in the output of a joint layer."""

    def __init__(self, shared: _Shared, name: str, start: int, stop: int) -> None:
        super().__init__()
        self._shared = shared
        self.name, self.start, self.stop = name, start, stop

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.output(x, self.name)[..., self.start : self.stop]


class Heads(nn.Module):
    """A projection with a layer for each head, 0, 1, …, whose outputs stand side by side."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


def form_of(model: nn.Module) -> Form:
    """Return the form of a model's queries, keys and values."""
    kinds = {type(module) for module in model.modules()}
    return Form.joint if Part in kinds else Form.heads if Heads in kinds else Form.separate


def to_form_(model: nn.Module, decoder: nn.Module, form: Form) -> None:
    """Give the attention modules of a dense model's decoder a form.

    Raises:
        ModelError: it has another form already, or no module that can take this one.
    """
    now = form_of(model)
    if now is form:
        return
    if now is not Form.separate:
        raise ModelError(f"the model's attention is {now.value} already; load it anew")
    attentions = [module for module in decoder.modules() if _has_projections(module)]
    if not attentions:
        raise ModelError(
            f"{type(model).__name__} has no attention with layers q_proj, k_proj and v_proj, which"
            f" form={form.value} needs; set model.sites.form=separate"
        )
    for attention in attentions:
        if form is Form.joint:
            _join_(attention)
        else:
            _divide_(attention)


def from_form_(model: nn.Module) -> None:
    """Undo `to_form_`, of dense layers."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Part):
                whole = module.get_submodule(JOINT)
                assert isinstance(whole, nn.Linear)
                bias = None if whole.bias is None else whole.bias[child.start : child.stop]
                trained = whole.weight.requires_grad
                part = _linear(whole.weight[child.start : child.stop], bias, trained)
                module.set_submodule(name, part)
            elif isinstance(child, Heads):
                module.set_submodule(name, _joined(list(child.children())))  # type: ignore[arg-type]
        if isinstance(getattr(module, JOINT, None), nn.Linear) and _has_projections(module):
            delattr(module, JOINT)


def _has_projections(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in PROJECTIONS]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return len(linear) == len(layers) and len({layer.in_features for layer in linear}) == 1


def _join_(attention: nn.Module) -> None:
    layers = [attention.get_submodule(name) for name in PROJECTIONS]
    attention.add_module(JOINT, _joined(layers))  # type: ignore[arg-type]
    shared, start = _Shared(attention), 0
    for name, layer in zip(PROJECTIONS, layers, strict=True):
        stop = start + int(layer.out_features)  # type: ignore[arg-type]
        attention.set_submodule(name, Part(shared, name, start, stop))
        start = stop


def _divide_(attention: nn.Module) -> None:
    size = getattr(attention, "head_dim", None)
    for name in PROJECTIONS:
        layer = attention.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if not isinstance(size, int) or layer.out_features % size:
            raise ModelError(f"{type(attention).__name__} does not name the size of its heads")
        weights, trained = layer.weight.split(size), layer.weight.requires_grad
        biases = [None] * len(weights) if layer.bias is None else list(layer.bias.split(size))
        parts = [_linear(w, b, trained) for w, b in zip(weights, biases, strict=True)]
        attention.set_submodule(name, Heads(parts))


def _joined(layers: list[nn.Linear]) -> nn.Linear:
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    weight = torch.cat([layer.weight for layer in layers])
    if biases and len(biases) < len(layers):
        raise ModelError("some of the layers have a bias and some have none; form=separate")
    trained = layers[0].weight.requires_grad
    return _linear(weight, torch.cat(biases) if biases else None, trained)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    out, width = weight.shape
    layer = nn.Linear(width, out, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return layer
