"""The models that are compared: dense, low rank, packed, with latent caches, with int8 rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import iosvd
from iosvd.layers.modules import LowRankLinear
from iosvd.layers.replacement import densify_, low_rank_layers
from iosvd.layers.rows import half_dtype, store_rows
from iosvd.quantization.stored import StoredRows

DENSE = "dense"
_TIED_BELOW = 1024  # Small models share embeddings and head.
# vocabulary, width, inner width, blocks, heads, heads of keys and values.
SHAPES = {
    "llama2_7b": (32000, 4096, 11008, 32, 32, 32),
    "llama3_8b": (128256, 4096, 14336, 32, 32, 8),
    "smollm2_135m": (49152, 576, 1536, 30, 9, 3),
    "small": (512, 64, 128, 2, 4, 2),
}
VARIANTS: dict[str, Callable[[PreTrainedModel], object]] = {
    DENSE: lambda model: densify_(model, model.dtype),
    "low rank": lambda model: model,
    "+ packed": iosvd.prepare_for_generation,
    "+ V latent": lambda model: iosvd.prepare_for_generation(model, "latent"),
    "+ KV latent": lambda model: iosvd.prepare_for_generation(model, "latent", "latent"),
    "packed, half of the rows int8": lambda model: iosvd.prepare_for_generation(int8_(model)),
}


@dataclass(frozen=True)
class Source:
    """A compressed model from which every variant is made."""

    name: str
    about: str  # Origin of the ranks.
    ratio: float
    build: Callable[[], PreTrainedModel]  # A new copy.

    def variant(self, name: str) -> PreTrainedModel:
        """Build one of VARIANTS."""
        model = self.build()
        VARIANTS[name](model)
        return model.eval().requires_grad_(False)


def copies_of(name: str, about: str, ratio: float, model: PreTrainedModel) -> Source:
    """Return a source that copies a model to its device; the original waits in main memory."""
    device = model.device
    model.cpu()
    return Source(name, about, ratio, lambda: copy.deepcopy(model).to(device))  # type: ignore[arg-type]


def random_source(
    shape: str, ratio: float, length: int, device: torch.device, dtype: torch.dtype
) -> Source:
    """Return a random Llama of a known shape, with factors of uniform ranks; nothing else is kept.

    Args:
        shape: one of SHAPES.
        ratio: maintenance ratio.
        length: the longest context.
        device: of the weights.
        dtype: of the weights.
    """
    vocabulary, hidden, inner, blocks, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=hidden < _TIED_BELOW,
    )

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        # Empty first, so that the dense weights are never there beside the factors.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            for name, site in list(model.model.layers.named_modules(prefix="model.layers")):
                if not isinstance(site, nn.Linear):
                    continue
                m, n = site.weight.shape
                rank = max(1, int(ratio * m * n / (m + n)))
                model.set_submodule(name, LowRankLinear(n, m, rank, dtype=dtype))
        model = model.to_empty(device=device)
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                many = parameter.dim() > 1
                parameter.normal_(std=parameter.shape[-1] ** -0.5) if many else parameter.fill_(1)
        model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # Empty as all else.
        return model

    return Source(shape, f"Random weights, uniform ranks at {ratio:g}", ratio, build)


def dense_bytes(shape: str, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of a dense model of a shape, and of its cache for one token of one row."""
    vocabulary, hidden, inner, blocks, heads, kv_heads = SHAPES[shape]
    kept = kv_heads * (hidden // heads)
    block = 2 * hidden * (hidden + kept) + 3 * hidden * inner
    tables = vocabulary * hidden * (1 if hidden < _TIED_BELOW else 2)
    size = torch.empty(0, dtype=dtype).element_size()
    return size * (blocks * block + tables), size * 2 * blocks * kept


def int8_(model: PreTrainedModel) -> PreTrainedModel:
    """Store every second row of all factors in int8, where components are rows."""
    for name, layer in low_rank_layers(model).items():
        if layer.rank < 2:
            continue
        chosen, halves = torch.arange(layer.rank) % 2 == 1, half_dtype(layer.weight.dtype)
        stored = {
            part: store_rows(layer.matrix(part), chosen, halves, part == "weight", name)
            for part in layer.shapes
        }
        rows, layouts = ({part: pair[i] for part, pair in stored.items()} for i in (0, 1))
        new = StoredRows(layer.rank, rows, layouts, rounding_loss=0.0).module(layer)  # type: ignore[arg-type]
        model.set_submodule(name, new)
    return model
