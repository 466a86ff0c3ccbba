"""Small vision-language models of several families, and windows of images and text for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

from iosvd.windows import Windows

IMAGE = 99  # The token in whose place an image stands.
TOKENS = torch.randint(1, 90, (8, 16), generator=torch.Generator().manual_seed(0))
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EYE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_CLIP = {"model_type": "clip_vision_model", **_EYE, "projection_dim": 16}
ROTATED = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
CONFIGS = {
    "idefics3": lambda: Idefics3Config(
        text_config=TEXT, vision_config=_EYE, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    ),
    "llava": lambda: LlavaConfig(text_config=TEXT, vision_config=_CLIP, image_token_index=IMAGE),
    "llava_next": lambda: LlavaNextConfig(
        text_config=TEXT,
        vision_config=_CLIP,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": ROTATED},
        vision_config={
            **{"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
            **{"patch_size": 4, "mlp_ratio": 2, "temporal_patch_size": 1},
        },
        image_token_id=IMAGE,
        vision_start_token_id=97,
        vision_end_token_id=98,
        video_token_id=96,
    ),
}


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIGS[kind]()).eval()


def seen(kind: str, seed: int = 1) -> dict[str, Tensor]:
    """Return a prompt of one random image and some text."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    # Idefics3 and Qwen2-VL join patches: 2 × 2 of 4 × 4. LLaVA-Next marks the end of each row.
    count = {"idefics3": 4, "llava": 16, "qwen2_vl": 4}.get(kind, 36)
    text = [5, 6, *[IMAGE] * count, 7, 8]
    found: dict[str, Any] = {"input_ids": torch.tensor([text])}
    found["attention_mask"] = torch.ones(1, len(text), dtype=torch.long)
    if kind == "idefics3":
        return found | {"pixel_values": pixels[None]}
    if kind == "llava_next":
        two = torch.stack([pixels[0], pixels[0]])[None]  # The whole, and its only tile.
        return found | {"pixel_values": two, "image_sizes": torch.tensor([[16, 16]])}
    if kind == "qwen2_vl":
        patches = torch.randn(16, 3 * 1 * 4 * 4, generator=generator)
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).long()
        return found | {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return found | {"pixel_values": pixels}


def windows_of(kind: str, number: int = 6) -> Windows:
    """Return windows of an image and a question each, of unequal length; only answers count."""
    prompts = [seen(kind, seed) for seed in range(number)]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place, prompt in enumerate(prompts):
        answer = torch.randint(5, 90, (2 + place % 3,), generator=generator)
        rows.append(torch.cat([prompt["input_ids"][0], answer]))
    length, start = max(map(len, rows)), prompts[0]["input_ids"].shape[1]
    tokens, filled = torch.zeros(number, length, dtype=torch.long), torch.zeros(number, length) > 0
    for row, text in enumerate(rows):
        tokens[row, : len(text)], filled[row, : len(text)] = text, True
    counted = torch.zeros_like(filled)
    counted[:, start - 1 : -1] = filled[:, start:]
    beside = []
    for prompt in prompts:
        one = {n: x for n, x in prompt.items() if n not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in one:
            one["mm_token_type_ids"] = (tokens[:1] == IMAGE).long()
        beside.append(one)
    return Windows(tokens, filled, counted, tuple(beside))
