"""The plugin for vLLM: its arithmetic here, its glue where vLLM is installed or imitated."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from iosvd.errors import CheckpointError
from iosvd.layers.folder import METHOD
from iosvd.layers.modules import LowRankLinear
from iosvd.serving.fused import Fused, Part, shard_index
from iosvd.serving.vllm_plugin import checked_ranks, ranks_of, register


def layers() -> list[nn.Linear]:
    """Return q and v of two factors and a dense k, with one input."""
    torch.manual_seed(0)
    q, k, v = LowRankLinear(10, 8, 3), nn.Linear(10, 4, bias=False), LowRankLinear(10, 4, 2)
    for layer in (q, v):
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return [q, k, v]


def test_fused_layers_compute_what_each_does() -> None:
    of = layers()
    fused = Fused([Part(8, 3), Part(4, None), Part(4, 2)])
    weight, left = torch.zeros(fused.rows, 10), torch.zeros(fused.left_entries)
    for shard, layer in zip("qkv", of, strict=True):
        fused.first_of(weight, shard_index(shard)).copy_(layer.weight.detach())
        if isinstance(layer, LowRankLinear):
            fused.left_of(left, shard_index(shard)).copy_(layer.left.detach())
    x = torch.randn(5, 10)
    expected = torch.cat([layer(x) for layer in of], dim=-1)
    torch.testing.assert_close(fused.product(x, weight, left), expected)


def test_names_of_fused_layers_are_found() -> None:
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    ranks = {"model.layers.0.self_attn.q_proj": 3, "model.layers.0.self_attn.o_proj": 7}
    assert ranks_of("model.layers.0.self_attn.qkv_proj", ranks, packed) == [3, None, None]
    assert ranks_of("model.layers.0.self_attn.o_proj", ranks, packed) == [7]
    assert ranks_of("lm_head", ranks, packed) == [None]


@pytest.mark.parametrize("other", ["rows", "four_bit", "biases"])
def test_what_is_not_served_is_refused(other: str) -> None:
    with pytest.raises(CheckpointError, match=f"has {other} beside factors.*export_dense"):
        checked_ranks({"quant_method": METHOD, "ranks": {"a": 1}, other: {"a": {}}})
    assert checked_ranks({"quant_method": METHOD, "ranks": {"a": 1}}) == {"a": 1}
    with pytest.raises(CheckpointError, match="is an expert"):
        checked_ranks({"quant_method": METHOD, "ranks": {"layers.0.mlp.experts.3.up_proj": 1}})


def test_the_entry_point_is_the_plugin() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="iosvd")
    assert found.load() is register


class _Linear(nn.Module):
    """Imitates a layer of vLLM: it creates, loads and applies weights through its method."""

    def __init__(self, method: Any, inputs: int, outputs: list[int]) -> None:
        super().__init__()
        method.create_weights(self, inputs, outputs, inputs, sum(outputs), torch.float32)
        self.method = method


def test_the_glue_loads_and_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """With vLLM's interface imitated: names and arguments as its plug-ins are given them."""
    registered: dict[str, Any] = {}
    linear, quantization, base = ModuleType("linear"), ModuleType("quantization"), ModuleType("b")
    linear.LinearBase = _Linear  # type: ignore[attr-defined]
    linear.LinearMethodBase = object  # type: ignore[attr-defined]
    linear.UnquantizedLinearMethod = type("UnquantizedLinearMethod", (), {})  # type: ignore[attr-defined]
    base.QuantizationConfig = type(  # type: ignore[attr-defined]
        "QuantizationConfig",
        (),
        {"packed_modules_mapping": {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}},
    )
    quantization.QUANTIZATION_METHODS = []  # type: ignore[attr-defined]
    quantization.register_quantization_config = lambda name: (  # type: ignore[attr-defined]
        lambda cls: registered.setdefault(name, cls)
    )
    start = "vllm.model_executor.layers"
    for name, module in {
        **dict.fromkeys(["vllm", "vllm.model_executor", start], ModuleType("vllm")),
        f"{start}.linear": linear,
        f"{start}.quantization": quantization,
        f"{start}.quantization.base_config": base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "iosvd.serving.vllm_layers", raising=False)
    register()
    monkeypatch.delitem(sys.modules, "iosvd.serving.vllm_layers")  # It holds the imitation.
    of = layers()
    config = registered[METHOD].from_config({"ranks": {"a.q_proj": 3, "a.v_proj": 2}})
    probe = _Linear.__new__(_Linear)
    method = config.get_quant_method(probe, "a.qkv_proj")
    fused = _Linear(method, 10, [8, 4, 4])
    for shard, layer in zip("qkv", of, strict=True):
        fused.weight.weight_loader(fused.weight, layer.weight.detach(), shard)  # type: ignore[operator, union-attr]
        if isinstance(layer, LowRankLinear):
            fused.left.weight_loader(fused.left, layer.left.detach(), shard)  # type: ignore[operator, union-attr]
    x, bias = torch.randn(5, 10), torch.randn(16)
    expected = torch.cat([layer(x) for layer in of], dim=-1) + bias
    torch.testing.assert_close(method.apply(fused, x, bias), expected)
    assert type(config.get_quant_method(probe, "a.o_proj")).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(nn.Embedding(2, 2), "embed_tokens") is None
    with pytest.raises(CheckpointError, match="tensor_parallel_size=1"):
        method.create_weights(nn.Module(), 5, [8, 4, 4], 10, 16, torch.float32)


def test_vllm_itself_knows_the_checkpoints() -> None:
    pytest.importorskip("vllm")
    register()
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config(METHOD).get_min_capability() == 0
