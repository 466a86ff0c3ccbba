"""Give linear layers that a model hides the form of torch.nn.Linear, so that they can be sites.

GPT-2 and its kind hold the transposed weight (Conv1D); a mixture of experts holds the weights of
all its experts in parameters of three dimensions. Both compute what layers of the usual form do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


class RoutedLinear(nn.Linear):
    """A linear layer of an expert, which sees only the tokens that are routed to it."""


class Experts(nn.Module):
    """The experts 0, 1, … of a block, each with its own linear layers.

    These are `gate_up` (both in one weight) or `up`, and `down`. The module takes the place of one
    of transformers whose weights hold all experts, and keeps that one, without its weights, for its
    activation: `fused`.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = int(fused.num_experts)  # type: ignore[arg-type]
        for number in range(self.num_experts):
            layers = {name: _one(fused, name, number) for name in _weights(fused)}
            self.add_module(str(number), nn.ModuleDict(layers))
        for name in list(dict(fused.named_parameters(recurse=False))):
            delattr(fused, name)
        fused._is_hf_initialized = True  # type: ignore[assignment]  # Or transformers tries to.
        self.fused = fused

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden: (tokens, d).
            chosen: (tokens, experts per token), numbers of experts.
            weights: of the same shape.
        """
        total = torch.zeros_like(hidden)
        for number in range(self.num_experts):
            if hidden.is_meta:  # Which tokens are routed where depends on values.
                self._output(number, hidden[:])  # Each expert reads a tensor of its own.
                continue
            token, place = torch.where(chosen == number)
            if len(token):
                output = self._output(number, hidden[token]) * weights[token, place, None]
                total = total.index_add(0, token, output.to(total.dtype))
        return total

    def _output(self, number: int, hidden: Tensor) -> Tensor:
        layers, fused = dict(self.get_submodule(str(number)).named_children()), self.fused
        if "gate_up" in layers:
            inner = fused._apply_gate(layers["gate_up"](hidden))  # type: ignore[operator]
        else:
            inner = fused.act_fn(layers["up"](hidden))  # type: ignore[operator]
        return layers["down"](inner)  # type: ignore[no-any-return]


def to_linear_form_(model: nn.Module) -> None:
    """Replace every Conv1D and every module of fused experts in a model; others are left alone."""
    from transformers.pytorch_utils import Conv1D

    new: dict[nn.Module, nn.Module] = {}  # One module may stand in several places.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Conv1D):
            new[module] = new.get(module) or _from_conv1d(module)
        elif _is_fused(module):
            new[module] = new.get(module) or Experts(module)
        if module in new:
            model.set_submodule(name, new[module])


def from_linear_form_(model: PreTrainedModel) -> None:
    """Undo `to_linear_form_`, of dense layers, as the architecture has them."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        original = type(model)(model.config)
    for name, module in original.named_modules():
        if isinstance(module, Conv1D):
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            module.weight = nn.Parameter(layer.weight.detach().T.contiguous())
            module.bias = layer.bias
            model.set_submodule(name, module)
        elif _is_fused(module):
            experts = model.get_submodule(name)
            assert isinstance(experts, Experts)
            model.set_submodule(name, _fused(module, experts))


def expert_of(model: nn.Module, name: str) -> int | None:
    """Return the number of the expert that a layer belongs to, which sees some tokens only.

    None if it belongs to none.
    """
    parts = name.split(".")
    for end, part in enumerate(parts):
        if part.isdecimal() and isinstance(model.get_submodule(".".join(parts[:end])), Experts):
            return int(part)
    return None


def _is_fused(module: nn.Module) -> bool:
    """Whether this is a module of transformers' common form of experts."""
    described = {"has_gate", "has_bias", "is_transposed", "num_experts"} <= set(vars(module))
    if not described or getattr(module, "has_post_expert_norm", False):
        return False
    return all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in _weights(module).values())


def _weights(fused: nn.Module) -> dict[str, object]:
    first = "gate_up" if fused.has_gate else "up"
    return {name: getattr(fused, f"{name}_proj", None) for name in (first, "down")}


def _one(fused: nn.Module, name: str, number: int) -> nn.Linear:
    """Return a layer of one expert, with a copy of its part of the weights."""
    weights = fused.get_parameter(f"{name}_proj")
    part = weights[number].T if fused.is_transposed else weights[number]
    bias = fused.get_parameter(f"{name}_proj_bias")[number] if fused.has_bias else None
    return _linear(RoutedLinear, part, bias, weights.requires_grad)


def _from_conv1d(module: nn.Module) -> nn.Linear:
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    return _linear(nn.Linear, weight.T, bias, weight.requires_grad)


def _linear(cls: type[nn.Linear], weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    out, width = weight.shape
    layer = cls(width, out, bias is not None, device="meta")
    copy = weight.detach().clone(memory_format=torch.contiguous_format)
    layer.weight = nn.Parameter(copy, requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return layer


def _fused(module: nn.Module, experts: Experts) -> nn.Module:
    """Fill a fused module on the meta device with the weights of its experts."""
    numbers = range(experts.num_experts)
    for name in _weights(module):
        layers = [experts.get_submodule(f"{number}.{name}") for number in numbers]
        weights = torch.stack([layer.get_parameter("weight").detach() for layer in layers])
        if module.is_transposed:
            weights = weights.transpose(1, 2).contiguous()
        setattr(module, f"{name}_proj", nn.Parameter(weights))
        if module.has_bias:
            biases = torch.stack([layer.get_parameter("bias").detach() for layer in layers])
            setattr(module, f"{name}_proj_bias", nn.Parameter(biases))
    return module
