"""Vision-language models: their language model is compressed, and they still see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import divided
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)

import iosvd
from iosvd.errors import ModelError
from iosvd.layers.replacement import compressed_layers
from iosvd.models.auto_class import LANGUAGE, VISION_LANGUAGE, auto_class_of
from iosvd.models.loading import Dtype, Model, load_model
from iosvd.models.sites import SiteSelection
from iosvd.statistics.planning import outline

IMAGE = 99  # The token in whose place an image stands.
TOKENS = torch.randint(1, 90, (8, 16), generator=torch.Generator().manual_seed(0))
_TEXT: dict[str, Any] = {
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
_ROTATED = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
CONFIGS = {
    "idefics3": lambda: Idefics3Config(
        text_config=_TEXT, vision_config=_EYE, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    ),
    "llava": lambda: LlavaConfig(text_config=_TEXT, vision_config=_CLIP, image_token_index=IMAGE),
    "llava_next": lambda: LlavaNextConfig(
        text_config=_TEXT,
        vision_config=_CLIP,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={**_TEXT, "model_type": "qwen2_vl_text", "rope_parameters": _ROTATED},
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


def seen(kind: str) -> dict[str, Tensor]:
    """Return a prompt of one random image and some text."""
    generator = torch.Generator().manual_seed(1)
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


def answered(model: PreTrainedModel, kind: str) -> tuple[Tensor, Tensor]:
    found = model.generate(
        **seen(kind),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_compressed_model_is_saved_loaded_and_still_sees(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    result = iosvd.compress(model, TOKENS, **divided({}), ratio=0.5)
    assert len(result.plan.sites) == 14  # Of two blocks of the language model.
    assert not any("vision" in name or "visual" in name for name in result.plan.sites)
    tokens, logits = answered(model, kind)
    iosvd.save(model, tmp_path / "saved", result.plan)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert compressed_layers(again).keys() == compressed_layers(model).keys()
    tokens2, logits2 = answered(again, kind)
    assert torch.equal(tokens, tokens2) and torch.equal(logits, logits2)
    # Another image is another answer: the model looks at it.
    other = {**seen(kind), "pixel_values": seen(kind)["pixel_values"] + 1}
    assert not torch.equal(model(**other).logits, model(**seen(kind)).logits)


@pytest.mark.parametrize("kind", ["idefics3", "llava"])
def test_latent_caches_hold_images_too(kind: str) -> None:
    model = build(kind)
    iosvd.compress(model, TOKENS, **divided({}), ratio=0.5)
    tokens, logits = answered(model, kind)
    prepared = iosvd.prepare_for_generation(model, "latent", "latent")
    tokens2, logits2 = answered(prepared, kind)
    assert torch.equal(tokens, tokens2)
    torch.testing.assert_close(logits, logits2, atol=1e-4, rtol=0)


def test_what_a_text_does_not_reach_is_left_alone() -> None:
    """Qwen2.5-VL's vision blocks have gated MLPs, which no text calls."""
    config = Qwen2_5_VLConfig(
        text_config={**_TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": _ROTATED},
        vision_config={
            **{"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2},
            **{"patch_size": 4, "out_hidden_size": 32},
        },
        image_token_id=IMAGE,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    iosvd.compress(model, TOKENS, **divided({}), ratio=0.5)
    logits = model(input_ids=TOKENS).logits
    prepared = iosvd.prepare_for_generation(model, "latent")
    torch.testing.assert_close(prepared(input_ids=TOKENS).logits, logits, atol=1e-4, rtol=0)


def test_positions_of_images_are_refused_with_latent_keys() -> None:
    """Qwen2-VL gives an image's tokens positions in two dimensions; text alone counts places."""
    model = build("qwen2_vl")
    iosvd.compress(model, TOKENS, **divided({}), ratio=0.5)
    logits = model(input_ids=TOKENS).logits
    prepared = iosvd.prepare_for_generation(model, k_cache="latent")
    torch.testing.assert_close(prepared(input_ids=TOKENS).logits, logits, atol=1e-4, rtol=0)
    with pytest.raises(ModelError, match="k_cache=full"):
        answered(prepared, "qwen2_vl")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_is_loaded_with_its_eyes(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    source = Model(kind, path=str(tmp_path), dtype=Dtype.float32, seq_len=16)
    loaded = load_model(source)
    assert type(loaded) is type(model)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert set(outline(source, 16).sites) == set(
        iosvd.compress(loaded, TOKENS, method="svd", ratio=0.5).plan.sites
    )


def test_vision_towers_need_images() -> None:
    everything = SiteSelection(include=["*.layers.*"])
    with pytest.raises(ModelError, match=r"vision_tower.* is not used.*model\.sites\.exclude"):
        iosvd.compress(build("llava"), TOKENS, method="svd", ratio=0.5, selection=everything)


def test_what_sees_is_told_from_what_reads() -> None:
    assert auto_class_of(build("llava").config) == VISION_LANGUAGE
    assert auto_class_of(build("llava").config.text_config) == LANGUAGE
