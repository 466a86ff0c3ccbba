"""A compressed checkpoint is trained, adapted, turned dense, and given a new head."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from conftest import build
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import iosvd
from experiments.small_models import small_model
from iosvd.layers.replacement import compressed_layers
from iosvd.models.linear_form import Experts

TOKENS = torch.randint(3, 31, (24, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    result = iosvd.compress(build("llama"), TOKENS, method="svd_llm", ratio=0.6)
    iosvd.save(result.model, tmp_path / "checkpoint", result.plan)
    return tmp_path / "checkpoint"


def loaded(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS[:2], use_cache=False).logits


def test_the_trainer_of_transformers_trains_the_factors(checkpoint: Path, tmp_path: Path) -> None:
    model = loaded(checkpoint)
    before = {n: layer.left.detach().clone() for n, layer in compressed_layers(model).items()}
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    options = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[]
    )
    trainer = Trainer(model, options, train_dataset=rows)  # type: ignore[arg-type]
    start = float(model(input_ids=TOKENS, labels=TOKENS).loss)
    trainer.train()
    assert float(model(input_ids=TOKENS, labels=TOKENS).loss) < start
    assert all(not torch.equal(v, compressed_layers(model)[n].left) for n, v in before.items())
    again = loaded(tmp_path / "out" / "checkpoint-3")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_lora_adapts_low_rank_layers(checkpoint: Path, targets: list[str] | str) -> None:
    base = loaded(checkpoint)
    before = logits(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, lora_alpha=4))
    assert torch.equal(logits(model), before)  # Its second factor is zero at first.
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    grown = [n for n, p in model.named_parameters() if p.grad is not None and "lora_B" in n]
    assert any("q_proj" in name for name in grown)
    assert not [n for n, p in model.named_parameters() if p.grad is not None and "lora" not in n]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.product().T + 2 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="size"):  # Two factors have no room for a third.
        model.merge_and_unload()


def test_dequantize_returns_an_ordinary_dense_model(checkpoint: Path, tmp_path: Path) -> None:
    model = loaded(checkpoint)
    before = logits(model)
    dense = model.dequantize()
    assert not compressed_layers(dense)
    assert not hasattr(dense.config, "quantization_config")
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    again = loaded(tmp_path / "dense")
    assert torch.equal(logits(again), logits(dense))


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_dequantize_and_export_give_hidden_linear_layers_their_form(
    kind: str, tmp_path: Path
) -> None:
    tokens = torch.randint(3, 500, (48, 32), generator=torch.Generator().manual_seed(0))
    result = iosvd.compress(small_model(kind), tokens, method="svd_llm", ratio=0.6)
    iosvd.save(result.model, tmp_path / "compressed")
    model = loaded(tmp_path / "compressed")
    with torch.no_grad():
        before = model(input_ids=tokens[:2], use_cache=False).logits
    iosvd.export_dense(model, tmp_path / "dense")
    plain = small_model(kind)
    dense = loaded(tmp_path / "dense")
    assert {n: t.shape for n, t in dense.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    assert not any(isinstance(module, Experts) for module in dense.modules())
    with torch.no_grad():
        found = dense(input_ids=tokens[:2], use_cache=False).logits
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)


def test_a_new_head_can_be_trained_on_a_compressed_body(checkpoint: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=torch.float32, num_labels=3, pad_token_id=0
    )
    body = loaded(checkpoint).model
    assert compressed_layers(model).keys() == {f"model.{name}" for name in compressed_layers(body)}
    with torch.no_grad():
        expected = body.eval()(input_ids=TOKENS[:2], use_cache=False).last_hidden_state
        found = model.model.eval()(input_ids=TOKENS[:2], use_cache=False).last_hidden_state
    assert torch.equal(found, expected)
    model(input_ids=TOKENS[:2], labels=torch.tensor([0, 1])).loss.backward()
    assert model.score.weight.grad is not None
