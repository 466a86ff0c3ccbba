"""Int8 rows come back bit for bit, take the bytes planned, and damage to them names the site."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    MIXED,
    QUANTIZATIONS,
    TOKENS,
    change_config,
    compressed,
    described,
    load,
    logits,
    saved,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM

import iosvd
from iosvd.errors import CheckpointError
from iosvd.layers.replacement import compressed_layers
from iosvd.quantization import Half, NoQuantization, Quantization, RoundToNearest


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_quantised_layers_come_back_bit_for_bit(
    family: str, dtype: torch.dtype, quantization: Quantization, tmp_path: Path
) -> None:
    result = compressed(family, dtype, quantization)
    iosvd.save(result.model, tmp_path / "one", result.plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype).eval()
    assert torch.equal(logits(loaded), logits(result.model))
    before, after = result.model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=dtype).eval()
    assert torch.equal(logits(again), logits(result.model))


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_the_file_and_the_loaded_layers_take_the_bytes_of_the_plan(
    quantization: Quantization, tmp_path: Path
) -> None:
    result = compressed("qwen2", torch.bfloat16, quantization)
    iosvd.save(result.model, tmp_path / "model", result.plan)
    sites = tuple(f"{name}." for name in result.plan.sites)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    on_disk = {n: t for n, t in tensors.items() if n.startswith(sites) and not n.endswith(".bias")}
    assert 8 * sum(t.nbytes for t in on_disk.values()) == result.plan.bits_kept
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    # Of all tensors there are, persistent or not, and of the memory behind them.
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for name, layer in compressed_layers(loaded).items()
        for part, t in (*layer.named_parameters(), *layer.named_buffers())
        if part != "bias" and t.numel()  # An empty one may have its neighbour's address.
    }
    dense = [n for n in result.plan.sites if type(loaded.get_submodule(n)) is torch.nn.Linear]
    weights = sum(loaded.get_submodule(name).weight.nbytes for name in dense)
    assert 8 * (sum(held.values()) + weights) == result.plan.bits_kept


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_quantised_layers_generate_train_compile_and_export(
    quantization: Quantization, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        saved(tmp_path, quantization), device_map="cpu"
    ).eval()
    generated = model.generate(TOKENS[:2], max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > TOKENS.shape[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(input_ids=TOKENS, use_cache=False).logits, logits(model))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    before = logits(model)
    iosvd.export_dense(model, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not compressed_layers(dense)
    assert_close(logits(dense), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantization", [NoQuantization(), Half(), MIXED], ids=str)
def test_a_body_saved_alone_loads_with_a_head(quantization: Quantization, tmp_path: Path) -> None:
    result = compressed("llama_tied", quantization=quantization)
    iosvd.save(result.model, tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "body")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "body").eval()
    assert torch.equal(logits(again), logits(result.model))


@pytest.mark.parametrize("quantization", [Half(), RoundToNearest(8)], ids=str)
def test_quantised_dense_layers_are_not_loaded_without_the_package(
    quantization: Quantization, tmp_path: Path
) -> None:
    folder = saved(tmp_path, quantization)
    assert not described(folder)["ranks"]
    script = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode != 0 and "mismatch" in ended.stderr


def first_mixed(folder: Path) -> tuple[str, dict[str, Any]]:
    rows = described(folder)["rows"]
    return next((name, of) for name, of in rows.items() if of["weight"]["ordered"])


def test_rows_that_the_weights_do_not_have_name_the_site(tmp_path: Path) -> None:
    folder = saved(tmp_path, MIXED)
    site, rows = first_mixed(folder)
    fewer = rows["weight"]["int8"] - 1
    change_config(folder, "rows", site, "weight", "int8", value=fewer)
    with pytest.raises(CheckpointError, match=f"disagree about {site}: weight should be"):
        load(folder)


@pytest.mark.parametrize(
    "change", [{"int8": 10**6}, {"int8": "many"}, {"code": "morse"}, {"colour": 1}], ids=str
)
def test_rows_that_cannot_be_name_the_site(change: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, MIXED)
    site, _ = first_mixed(folder)
    for key, value in change.items():
        change_config(folder, "rows", site, "weight", key, value=value)
    with pytest.raises(CheckpointError, match=f"rows of {site} that cannot be") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_an_order_that_config_does_not_know_names_the_site(tmp_path: Path) -> None:
    folder = saved(tmp_path, MIXED)
    site, _ = first_mixed(folder)
    change_config(folder, "rows", site, "weight", "ordered", value=False)
    with pytest.raises(CheckpointError, match=f"about {site}: it describes no weight_order"):
        load(folder)


def test_other_files_than_safetensors_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, MIXED)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no safetensors file"):
        load(folder)


@pytest.mark.parametrize(("part", "bad"), [("order", 0), ("scale", float("nan"))])
def test_damaged_rows_name_the_site(part: str, bad: float, tmp_path: Path) -> None:
    folder = saved(tmp_path, MIXED)
    site, _ = first_mixed(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{site}.weight_{part}"][:] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"weight_{part} of {site} .* damaged"):
        load(folder)


@pytest.mark.parametrize("part", ["weight", "weight_int8", "weight_scale", "weight_order"])
def test_missing_rows_are_an_error(part: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, MIXED)
    site, _ = first_mixed(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{site}.{part}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no tensor {site}.{part}"):
        load(folder)
