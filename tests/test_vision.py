"""Vision-language models: their language model is compressed, and they still see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import divided
from seeing import CONFIGS, IMAGE, ROTATED, TEXT, TOKENS, build, seen
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2_5_VLConfig

import iosvd
from iosvd.errors import ModelError
from iosvd.layers.replacement import compressed_layers
from iosvd.models.auto_class import LANGUAGE, VISION_LANGUAGE, auto_class_of
from iosvd.models.loading import Dtype, Model, load_model
from iosvd.models.sites import SiteSelection
from iosvd.statistics.planning import outline


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
        text_config={**TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": ROTATED},
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
