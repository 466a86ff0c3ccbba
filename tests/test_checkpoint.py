"""A compressed model is an ordinary checkpoint, and a damaged one is never a random model."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import (
    QUANTIZATIONS,
    TOKENS,
    change_config,
    compressed,
    first_site,
    load,
    logits,
    saved,
)
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM

import iosvd
from iosvd.allocation import Spectral
from iosvd.correction import Anchored
from iosvd.errors import CheckpointError, ModelError
from iosvd.layers.modules import LowRankLinear
from iosvd.layers.replacement import compressed_layers, low_rank_layers, stored_bytes
from iosvd.method import Method
from iosvd.pipeline import compress
from iosvd.quantization import NoQuantization, Quantization
from iosvd.types import Factors
from iosvd.whitening import InputOutput


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_equal_bit_for_bit_after_save_and_load(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    result = compressed(family, dtype)
    ranks = {name: layer.rank for name, layer in low_rank_layers(result.model).items()}
    assert ranks == result.plan.ranks != {}
    iosvd.save(result.model, tmp_path / "one", result.plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype).eval()
    assert torch.equal(logits(loaded), logits(result.model))
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=dtype).eval()
    assert torch.equal(logits(again), logits(result.model))
    assert {name: layer.rank for name, layer in low_rank_layers(again).items()} == ranks


@pytest.mark.parametrize("quantization", [NoQuantization(), *QUANTIZATIONS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_that_a_correction_added_come_back(
    family: str, dtype: torch.dtype, quantization: Quantization, tmp_path: Path
) -> None:
    """The architecture has none there, which an export as a dense model refuses."""
    result = compressed(family, dtype, quantization, correction=Anchored(bias=True))
    added = {n for n, layer in compressed_layers(result.model).items() if layer.added_bias}
    assert added == {name for name, site in result.plan.sites.items() if site.added_bias}
    iosvd.save(result.model, tmp_path / "model", result.plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype).eval()
    assert torch.equal(logits(loaded), logits(result.model))
    assert {n for n, layer in compressed_layers(loaded).items() if layer.added_bias} == added
    assert stored_bytes(loaded, result.plan.sites) == stored_bytes(result.model, result.plan.sites)
    if dtype == torch.bfloat16:  # As the plan counts.
        assert 8 * stored_bytes(loaded, result.plan.sites) == result.plan.bits_kept
    if added:
        with pytest.raises(CheckpointError, match=r"correction\.bias=false"):
            iosvd.export_dense(loaded, tmp_path / "dense")


def test_the_folder_holds_what_it_should(tmp_path: Path) -> None:
    result = compressed()
    iosvd.save(result.model, tmp_path / "model", result.plan)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "plan.json"}
    assert not {n for n in names if n.endswith((".bin", ".pt", ".pkl"))}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "iosvd",
        "ranks": result.plan.ranks,
        "linear_form": True,
    }
    plan = json.loads((tmp_path / "model" / "plan.json").read_text())
    assert plan["ratio_asked"] == 0.6
    assert plan["ratio_achieved"] == result.plan.ratio_achieved
    assert plan["predicted_kl"] == result.plan.predicted_kl
    assert plan["versions"]["torch"] == torch.__version__
    assert {n: s["rank"] for n, s in plan["sites"].items() if not s["dense"]} == result.plan.ranks
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    stored = sum(
        t.numel() for name, t in tensors.items() if ".layers." in name and "norm" not in name
    )
    assert stored == result.plan.parameters_kept


def test_loading_without_the_package_is_an_error(tmp_path: Path) -> None:
    """In a process of its own, because here the package is imported."""
    script = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "assert 'iosvd' not in sys.modules\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(saved(tmp_path))]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode != 0
    assert "mismatch" in ended.stderr


def test_dense_export_is_read_without_the_package(tmp_path: Path) -> None:
    result = compressed()
    before = logits(result.model)
    iosvd.export_dense(result.model, tmp_path / "dense")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "tokens = torch.tensor(eval(sys.argv[2]))\n"
        "torch.save(model(input_ids=tokens).logits, 'logits.pt')\n"
        "assert 'iosvd' not in sys.modules"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "dense"), str(TOKENS.tolist())]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert_close(torch.load(tmp_path / "logits.pt"), before, rtol=1e-3, atol=1e-3)
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_generate_and_gradients_work_after_loading(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path)).eval()
    generated = model.generate(TOKENS[:2], max_new_tokens=5, do_sample=False)
    assert generated.shape[0] == 2
    assert generated.shape[1] > TOKENS.shape[1]
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for layer in low_rank_layers(model).values():
        for factor in (layer.weight, layer.left):
            assert factor.grad is not None
            assert factor.grad.abs().sum() > 0


def test_a_loaded_model_compiles_in_one_graph(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=TOKENS, use_cache=False).logits
    assert_close(found, logits(model))


def test_a_loaded_model_exports_dense(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path)).eval()
    before = logits(model)
    iosvd.export_dense(model, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not low_rank_layers(dense)
    assert_close(logits(dense), before, rtol=1e-3, atol=1e-3)


def test_a_tokenizer_that_cannot_be_written_is_a_write_failure(tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    result = compressed()
    with pytest.raises(CheckpointError, match="No space left"):
        iosvd.save(result.model, tmp_path / "model", tokenizer=Full())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_factors_have_the_strides_that_loading_gives() -> None:
    """Those of a dimension of size 1 are free; products with them round differently."""
    factors = Factors(torch.randn(8, 1), torch.randn(4, 1).T, torch.ones(1), torch.ones(1))
    assert factors.right.is_contiguous() and factors.right.stride() == (1, 1)
    layer = LowRankLinear.from_factors(torch.nn.Linear(4, 8), factors)
    assert layer.weight.stride() == (4, 1) and torch.equal(layer.weight, factors.right)


def test_low_rank_layer_is_the_product_of_its_factors() -> None:
    for layer in low_rank_layers(compressed("qwen2").model).values():
        x = torch.randn(4, layer.in_features)
        bias = 0 if layer.bias is None else layer.bias
        assert_close(layer(x), x @ (layer.left @ layer.weight).T + bias)
        assert_close(layer.dense(torch.float32)(x), layer(x))


def test_a_model_without_head_loads_too(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    body = AutoModel.from_pretrained(folder).eval()
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(
            body(input_ids=TOKENS).last_hidden_state, whole.model(input_ids=TOKENS)[0]
        )


def test_sharded_checkpoints_and_device_maps_load(tmp_path: Path) -> None:
    result = compressed()
    result.model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", device_map="cpu").eval()
    assert torch.equal(logits(loaded), logits(result.model))


def test_compressing_twice_is_refused() -> None:
    result = compressed()
    with pytest.raises(ModelError, match="compressed already"):
        compress(result.model, TOKENS, ratio=0.5, method=Method(InputOutput(), Spectral()))


@pytest.mark.parametrize("part", ["weight", "left"])
def test_a_missing_tensor_is_an_error(part: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = f"{first_site(folder)[0]}.{part}"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no tensor {name}"):
        load(folder)


def test_a_missing_norm_is_an_error_too(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(folder)


def test_a_wrong_rank_is_an_error(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    site, rank = first_site(folder)
    change_config(folder, "ranks", site, value=rank + 1)
    with pytest.raises(CheckpointError, match=f"disagree about {site}: weight"):
        load(folder)


@pytest.mark.parametrize("rank", [0, 10**6])
def test_an_impossible_rank_names_the_site(rank: int, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    site, _ = first_site(folder)
    change_config(folder, "ranks", site, value=rank)
    with pytest.raises(CheckpointError, match=f"{site} rank {rank}"):
        load(folder)


def test_a_site_the_model_lacks_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change_config(folder, "ranks", "model.layers.9.mlp.up_proj", value=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.mlp\.up_proj"):
        load(folder)


def test_a_truncated_file_is_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"cannot load the model in {folder}") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compressed()

    def full(path: Path, *_: object, **__: object) -> None:
        (Path(path) / "half-written.safetensors").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(result.model, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left.*nothing was left"):
        iosvd.save(result.model, tmp_path / "model", result.plan)
    assert list(tmp_path.iterdir()) == []


def test_a_real_write_failure_leaves_nothing(tmp_path: Path) -> None:
    """With the size of files limited by the system, which is what a quota or a full disk does."""
    script = """
import resource, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from test_checkpoint import compressed
import iosvd
from iosvd.errors import CheckpointError
result = compressed()
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    iosvd.save(result.model, "model", result.plan)
except CheckpointError as error:
    print("refused:", error)
"""
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout.startswith("refused: cannot write model"), ended.stderr
    assert ended.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = compressed()
    with pytest.raises(CheckpointError, match="exists already"):
        iosvd.save(result.model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_first_tensor_of_a_layer_never_has_the_dense_shape() -> None:
    """What makes loading without the package fail, for every rank a plan can hold."""
    for rank in range(1, 6):
        layer = LowRankLinear(in_features=6, out_features=6, rank=rank)
        assert layer.weight.shape != (6, 6)


@pytest.mark.parametrize("first", ["iosvd", "transformers.quantizers.auto"])
def test_transformers_is_taught_whichever_is_imported_first(first: str) -> None:
    """And the import itself is light: rendering a table must not wait for transformers' models."""
    code = f"""
import importlib, sys
importlib.import_module({first!r})
light = "transformers.modeling_utils" not in sys.modules
import iosvd
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "iosvd" in AUTO_QUANTIZER_MAPPING
assert iosvd.save and iosvd.export_dense
print(light)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert first != "iosvd" or done.stdout == "True\n"


def test_a_link_to_an_empty_folder_can_be_saved_to(tmp_path: Path) -> None:
    result = compressed()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    iosvd.save(result.model, tmp_path / "link", result.plan)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").exists()


def test_loaded_weights_are_where_torch_would_put_them(tmp_path: Path) -> None:
    """At other addresses, which mapped files have, products of some shapes round differently."""
    model = compressed("opt", torch.float32).model
    iosvd.save(model, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())
