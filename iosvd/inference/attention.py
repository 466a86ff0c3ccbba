"""Attention that caches the latents of v_proj and k_proj (METHODS 8).

V: attention acts on tokens, the left factor on features, so they commute:
softmax(Q Kᵀ) (Z_v U_vᵀ) = (softmax(Q Kᵀ) Z_v) U_vᵀ. A step attends to the latents Z_v, which all
heads share, and multiplies the result by the rows of U_v of each head.

K: the rotation does not commute with U_k, so a step rebuilds the keys from Z_k, a tile of tokens at
a time, rotates them and multiplies them by the query. Neither is done for more than one token:
with many queries it takes fewer operations to rebuild K and V once and attend as usual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from iosvd.inference.cache import allocate_static_layer_
from iosvd.inference.factors import HeadFactor, folded_right
from iosvd.inference.packed import Packed, PackedModule, up_product
from iosvd.inference.rotary import RotaryTable, rotate
from iosvd.layers.modules import LowRankLinear

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import Cache

# Entries of K that a step rebuilds at a time: what a core's cache holds, or what fills a GPU.
TILE_ENTRIES = {"cpu": 2**18, "cuda": 2**26}


class GenerationAttention(PackedModule):
    """Takes the place of an attention module with q, k, v, o projections and rotary embeddings."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    _like: Tensor

    def __init__(
        self,
        attention: nn.Module,
        table: RotaryTable | None,
        *,
        packed: bool,
        latent_v: bool,
        dtype: torch.dtype,
    ) -> None:
        """Take over the children of an attention module.

        Args:
            attention: the module, whose structure was checked.
            table: angles of the places of a cache; None: keys are cached as usual.
            packed: whether the first products of q, k and v are one.
            latent_v: whether v_proj's latents are cached.
            dtype: of hidden states; weights in rows have another.
        """
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        for name in ("config", "layer_idx", "head_dim", "scaling"):
            setattr(self, name, getattr(attention, name))
        self.is_causal = True
        self.sliding_window = getattr(attention, "sliding_window", None)
        self.heads = self.q_proj.out_features // self.head_dim
        self.kv_heads = self.k_proj.out_features // self.head_dim
        self.num_key_value_groups = self.heads // self.kv_heads
        self.latent_k, self.latent_v = table is not None, latent_v
        self._table, self._join = table, packed
        # Cast and moved with the module.
        like = torch.empty(0, dtype=dtype, device=self.o_proj.weight.device)
        self.register_buffer("_like", like, persistent=False)
        self.pack_()

    def pack_(self) -> None:
        layers = [self.q_proj, self.k_proj, self.v_proj]
        self._packed_down = Packed(layers, join=self._join)
        dtype = self._like.dtype
        if self.latent_k:
            assert isinstance(self.k_proj, LowRankLinear)
            self._up_k = HeadFactor(self.k_proj, self.kv_heads, dtype)
        if self.latent_v:
            assert isinstance(self.v_proj, LowRankLinear)
            self._up_v = HeadFactor(self.v_proj, self.kv_heads, dtype)
            self._folded = folded_right(self.o_proj, self._up_v, self.num_key_value_groups)

    @property
    def cache_entries(self) -> tuple[int, int]:
        """Entries of keys and of values that are cached for a token."""
        full = self.kv_heads * self.head_dim
        kept = ((self.k_proj, self.latent_k), (self.v_proj, self.latent_v))
        key, value = (
            layer.rank if latent and isinstance(layer, LowRankLinear) else full
            for layer, latent in kept
        )
        return key, value

    @property
    def derived(self) -> list[Tensor]:
        """Tensors beside the weights that a step reads: copies of int8 factors, folded products."""
        factors = [self._up_k.left] if self.latent_k else []
        if self.latent_v:
            factors.append(self._up_v.left)
            factors += [] if self._folded is None else [self._folded.product]
        return factors

    @property
    def itemsize(self) -> int:
        """Bytes of a cached entry."""
        return self._like.element_size()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = self._packed_down(hidden_states)
        query = self._heads(up_product(self.q_proj, query), "q_norm")
        past: int | Tensor = 0
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.layer_idx)
        visible = self._visible(past, query.shape[2])  # Before a static cache counts on.
        if self.latent_k:
            query = rotate(query, *self._angles(past, past_key_values, query))
            key = key.unsqueeze(1)
        else:
            cos, sin = (angle.unsqueeze(1) for angle in position_embeddings)
            key = self._heads(up_product(self.k_proj, key), "k_norm")
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        latent = self.latent_v
        value = value.unsqueeze(1) if latent else self._heads(up_product(self.v_proj, value))
        if past_key_values is not None:
            allocate_static_layer_(past_key_values, self.layer_idx, key, value)
            key, value = past_key_values.update(key, value, self.layer_idx)
        if visible is not None and key.shape[2] > visible:  # The rest is not yet written.
            key, value = key[:, :, :visible], value[:, :, :visible]
            mask = attention_mask
            attention_mask = None if mask is None else mask[..., :visible]
        if query.shape[2] == 1 and (self.latent_k or self.latent_v):
            return self._step(query, key, value, attention_mask), None
        attended = self._attend(query, key, value, attention_mask, kwargs)
        return self.o_proj(attended), None

    @staticmethod
    def _visible(past: int | Tensor, new: int) -> int | None:
        """Return the tokens that a cache will hold; None where asking would stall a GPU."""
        if torch.compiler.is_compiling():
            return None
        stalls = isinstance(past, Tensor) and past.device.type != "cpu" and new == 1
        return None if stalls else int(past) + new

    def _heads(self, features: Tensor, norm: str = "") -> Tensor:
        """Return (batch, heads, tokens, D) from (batch, tokens, heads · D), normalised."""
        heads = features.unflatten(-1, (-1, self.head_dim))
        if norm and hasattr(self, norm):
            heads = getattr(self, norm)(heads)
        return heads.transpose(1, 2)

    def _angles(
        self, past: int | Tensor, cache: Cache | None, query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (tokens, D) of the new tokens' indices in the cache."""
        assert self._table is not None
        length = new = query.shape[2]
        if cache is not None:  # Of a static cache, all that it may hold.
            length, _ = cache.get_mask_sizes(new, self.layer_idx)
        cos, sin = self._table.up_to(length, query)
        if isinstance(past, int):
            return cos[past : past + new], sin[past : past + new]
        indices = past + torch.arange(new, device=past.device)
        return cos.index_select(0, indices), sin.index_select(0, indices)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Attend as usual, with K and V rebuilt in full."""
        if self.latent_k:
            key = self._keys(key[:, 0], 0).transpose(0, 1)
        if self.latent_v:
            value = self._rows(self._up_v, value[:, 0]).transpose(0, 1)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return attended.flatten(2)

    def _rows(self, factor: HeadFactor, latents: Tensor) -> Tensor:
        """Return features (kv heads, batch, tokens, D) of latents (batch, tokens, k)."""
        return factor.up(latents.reshape(-1, latents.shape[-1])).unflatten(1, latents.shape[:2])

    def _keys(self, latents: Tensor, first: int) -> Tensor:
        """Return rotated keys (kv heads, batch, tokens, D) of latents from index `first` on."""
        assert self._table is not None
        keys = self._rows(self._up_k, latents)
        if hasattr(self, "k_norm"):
            keys = self.k_norm(keys)  # type: ignore[operator]
        last = first + latents.shape[1]
        cos, sin = self._table.up_to(last, keys)
        return rotate(keys, cos[first:last], sin[first:last])

    def _step(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with one query (batch, heads, 1, D); return the output (batch, 1, d)."""
        # Scaled first: in float16 unscaled scores overflow where sdpa's do not.
        scaled = self.scaling * query.squeeze(2)
        scores = self._scores(scaled.unflatten(1, (self.kv_heads, -1)), key)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        precise = torch.promote_types(query.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=precise).to(query.dtype)
        if not self.latent_v:
            return self.o_proj(torch.matmul(weights, value).flatten(1).unsqueeze(1))
        latents = weights.flatten(1, 2).bmm(value[:, 0])  # (B, heads, k): all heads read Z_v once.
        if self._folded is not None:
            return up_product(self.o_proj, self._folded(latents.flatten(1).unsqueeze(1)))
        by_head = latents.unflatten(1, (self.kv_heads, -1)).transpose(0, 1)
        attended = self._up_v.up(by_head.flatten(1, 2)).unflatten(1, by_head.shape[1:3])
        return self.o_proj(attended.transpose(0, 1).flatten(1).unsqueeze(1))

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return Q Kᵀ (batch, kv heads, G, tokens) of queries (batch, kv heads, G, D)."""
        if not self.latent_k:
            return torch.matmul(query, key.transpose(-1, -2))
        latents, by_head = key[:, 0], query.transpose(0, 1)
        entries = TILE_ENTRIES.get(key.device.type, TILE_ENTRIES["cuda"])
        tile = max(32, entries // (len(latents) * self.kv_heads * self.head_dim))
        tiles = [
            torch.matmul(by_head, self._keys(latents[:, at : at + tile], at).transpose(-1, -2))
            for at in range(0, latents.shape[1], tile)
        ]
        return torch.cat(tiles, dim=-1).transpose(0, 1)
