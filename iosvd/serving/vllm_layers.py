"""The layers of a compressed checkpoint in vLLM; importing this registers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from iosvd.errors import CheckpointError
from iosvd.layers.folder import METHOD
from iosvd.serving.fused import Fused, Part, shard_index
from iosvd.serving.vllm_plugin import checked_ranks, ranks_of


class LowRankMethod(LinearMethodBase):  # type: ignore[misc]
    """Creates and multiplies the factors of one layer of vLLM."""

    def __init__(self, ranks: list[int | None]) -> None:
        self.ranks = ranks

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        whole = (input_size, output_size)
        if (input_size_per_partition, sum(output_partition_sizes)) != whole:
            raise CheckpointError(
                "factors are not divided among GPUs; set tensor_parallel_size=1, or export the"
                " model with iosvd.export_dense"
            )
        sizes = zip(output_partition_sizes, self.ranks, strict=True)
        fused = Fused([Part(outputs, rank) for outputs, rank in sizes])
        layer.fused = fused  # type: ignore[assignment]
        weight = torch.empty(fused.rows, input_size, dtype=params_dtype)
        left = torch.empty(fused.left_entries, dtype=params_dtype)
        _register(layer, "weight", weight, fused.first_of)
        _register(layer, "left", left, fused.left_of)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        fused: Any = layer.fused
        output: Tensor = fused.product(x, layer.weight, layer.left)
        return output if bias is None else output + bias


@register_quantization_config(METHOD)  # type: ignore[untyped-decorator]
class LowRankServing(QuantizationConfig):  # type: ignore[misc]
    """Ranks of the layers, from the checkpoint's config.json."""

    def __init__(self, ranks: dict[str, int]) -> None:
        super().__init__()
        self.ranks = ranks

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankServing:
        return cls(checked_ranks(config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        ranks = ranks_of(prefix, self.ranks, self.packed_modules_mapping)
        none = all(rank is None for rank in ranks)
        return UnquantizedLinearMethod() if none else LowRankMethod(ranks)


def _register(
    layer: nn.Module, name: str, values: Tensor, view: Callable[[Tensor, int], Tensor]
) -> None:
    """Give a layer a parameter that a server fills part by part."""

    def load(parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        view(parameter.data, shard_index(shard)).copy_(loaded)

    parameter = nn.Parameter(values, requires_grad=False)
    parameter.weight_loader = load  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)
