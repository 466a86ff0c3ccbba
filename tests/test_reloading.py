"""A run whose checkpoint does not load back equal fails as a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import iosvd
from experiments.small_models import small_model
from iosvd.errors import CheckpointError
from iosvd.layers.reloading import check_reloads
from iosvd.models.linear_form import from_linear_form_
from iosvd.models.loading import ASSETS
from iosvd.models.sites import SiteSelection
from iosvd.runs import measurement
from iosvd.runs.config import compose_run
from iosvd.runs.execution import Outcome, execute
from iosvd.runs.records import CHECKPOINT, FAILURE, run_folder

TOKENS = torch.randint(3, 31, (24, 16), generator=torch.Generator().manual_seed(0))


def saved(folder: Path) -> PreTrainedModel:
    result = iosvd.compress(build("llama_tied"), TOKENS, method="svd_llm", ratio=0.6)
    iosvd.save(result.model, folder, result.plan)
    return result.model


@pytest.mark.parametrize("part", ["left", "norm.weight", "embed_tokens.weight"])
def test_every_tensor_is_compared(part: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "checkpoint")
    check_reloads(model, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name].view(-1)[-1] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"does not load back.*{name} is different"):
        check_reloads(model, tmp_path / "checkpoint")


def test_a_config_that_changes_what_is_computed_is_found(tmp_path: Path) -> None:
    model = saved(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] = 5.0
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"inv_freq is different"):
        check_reloads(model, tmp_path / "checkpoint")


def test_frequencies_that_follow_the_length_of_the_input_are_not_compared(tmp_path: Path) -> None:
    half = [1.0] * 8
    rope = {"rope_type": "longrope", "short_factor": half, "long_factor": [2.0] * 8,
            "rope_theta": 1e4, "original_max_position_embeddings": 16}  # fmt: skip
    model = small_model(
        "phi3", rope_parameters=rope, original_max_position_embeddings=16, pad_token_id=0
    )
    long = torch.randint(3, 500, (24, 32), generator=torch.Generator().manual_seed(0))
    result = iosvd.compress(model, long, method="svd_llm", ratio=0.6)
    iosvd.save(result.model, tmp_path / "one")
    check_reloads(result.model, tmp_path / "one")


def test_checkpoints_of_the_version_before_load(tmp_path: Path) -> None:
    """Their experts were dense, and their tensors had the names that transformers gave them."""
    model = small_model("mixtral")
    tokens = torch.randint(3, 500, (24, 32), generator=torch.Generator().manual_seed(0))
    some = SiteSelection(include=["*.self_attn.*"])
    result = iosvd.compress(model, tokens, method="svd_llm", ratio=0.6, selection=some)
    with torch.no_grad():
        expected = result.model(input_ids=tokens[:2], use_cache=False).logits
    from_linear_form_(result.model)
    result.model._weight_conversions = None  # type: ignore[assignment]
    result.model.config.quantization_config.linear_form = False
    iosvd.save(result.model, tmp_path / "old")
    names = load_file(tmp_path / "old" / "model.safetensors")
    assert any("w1" in name for name in names) and not any(".gate_up" in name for name in names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "old", dtype=torch.float32).eval()
    with torch.no_grad():
        found = loaded(input_ids=tokens[:2], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # Experts in another form.


def test_the_run_fails_and_keeps_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compose_run(
        [
            *("method=svd_llm", "ratio=0.6", "runtime.save_checkpoint=true"),
            *("calibration.windows=4", "calibration.seq_len=32", "eval.windows=2"),
            *(f"model.path={ASSETS / 'tiny'}", "model=local", f"runtime.results={tmp_path}"),
        ]
    )

    def refuse(*_: object) -> None:
        raise CheckpointError("it is different")

    monkeypatch.setattr(measurement, "check_reloads", refuse)
    assert execute(run) is Outcome.failed
    folder = run_folder(run)
    assert "it is different" in json.loads((folder / FAILURE).read_text())["error"]
    assert not (folder / CHECKPOINT).exists()


def test_tensors_that_transformers_would_rename_load_back(tmp_path: Path) -> None:
    """Gemma 3 with its vision tower: in files, the names of its tensors begin otherwise."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "sliding_window": 16, "max_position_embeddings": 64}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision,
                                  mm_tokens_per_image=4, image_token_index=63)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    selection = SiteSelection(exclude=["*vision*"])
    result = iosvd.compress(model, TOKENS, method="svd_llm", ratio=0.6, selection=selection)
    iosvd.save(result.model, tmp_path / "one", result.plan)
    check_reloads(result.model, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32).eval()
    loaded.save_pretrained(tmp_path / "two")  # As users do.
    check_reloads(result.model, tmp_path / "two")
