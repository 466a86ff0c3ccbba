"""Models come from folders, the hub or the package, or there is one clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import sentencepiece
import torch
import transformers
from conftest import build, shared
from safetensors.torch import load_file, save_file

from experiments.small_models import small_model
from iosvd.errors import ConfigError, ModelError, StorageError
from iosvd.models.loading import ASSETS, Dtype, Model, context_of, load_model, load_tokenizer


def test_the_embedded_model_is_small_and_safe() -> None:
    folder = ASSETS / "tiny"
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 8 * 2**20
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    model = load_model(Model("tiny", embedded=True, dtype=Dtype.bfloat16))
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    tokenizer = load_tokenizer(Model("tiny", embedded=True))
    text = "Return the number of items: naïve, Σ and 漢字."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("dtype", list(Dtype))
def test_weights_are_loaded_in_the_dtype_asked_for(dtype: Dtype, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = load_model(Model("saved", path=str(tmp_path), dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype.value)}
    assert not model.training


def test_a_device_map_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path)
    load, seen = transformers.AutoModelForCausalLM.from_pretrained, {}
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **options: (seen.update(options), load(*a, **options))[1],
    )
    load_model(Model("saved", path=str(tmp_path)), device="nonsense", device_map="auto")
    assert seen["device_map"] == "auto"
    assert seen["trust_remote_code"] is False


def test_no_source_and_no_folder_say_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model x has no source; set model\.path=FOLDER"):
        load_model(Model("x"))
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match=f"{path} is not a model folder.*set model.path"):
            load_model(Model("x", path=str(path)))


@pytest.mark.parametrize("damage", ["config", "weights", "none"])
def test_a_damaged_folder_is_one_line(damage: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    if damage == "config":
        (tmp_path / "config.json").write_text("{")
    elif damage == "weights":
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    else:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"cannot load the model in {tmp_path}") as error:
        load_model(Model("x", path=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_says_which_option_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    # It would try the network several times.
    monkeypatch.setattr("transformers.utils.peft_utils.find_adapter_config_file", refuse)
    for loader in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"cannot load org/name.*model\.path=FOLDER") as error:
        load_model(Model("x", hub_id="org/name"))
    assert "\n" not in str(error.value)


HUB = """
import sys
from iosvd.models.loading import Model, hub_revision
from iosvd.runs.config import compose_run
from iosvd.runs.fingerprints import model_identity
model = Model("x", hub_id="somebody/small")
run = compose_run(["model=hub", "model.hub_id=somebody/small", "dataset=pydoc", "eval=pydoc"])
print(hub_revision(model), model_identity(run, hub_revision(model)))
"""


def test_the_commit_of_a_model_on_the_hub_is_known(tmp_path: Path) -> None:
    """In a cache of the hub's client, without a network; `main` moves to another commit."""
    place = tmp_path / "hub" / "models--somebody--small"
    (place / "refs").mkdir(parents=True)
    found = []
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(ASSETS / "tiny", place / "snapshots" / commit)
        (place / "refs" / "main").write_text(commit)
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        environment.pop("HF_HUB_CACHE", None)
        done = subprocess.run(
            [sys.executable, "-c", HUB],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert [commit for commit, _ in found] == ["a" * 40, "b" * 40]
    assert found[0][1] != found[1][1]


def test_a_model_folder_that_lacks_a_weight_is_one_line(tmp_path: Path) -> None:
    model = load_model(Model("tiny", embedded=True, dtype=Dtype.float32))
    state = {name: value for name, value in model.state_dict().items() if "5.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"lacks 1 weights, for instance model.layers.5.mlp.up_pr"):
        load_model(Model("small", path=str(tmp_path)))


def test_an_adapter_in_the_folder_is_refused(tmp_path: Path) -> None:
    """Beside the model transformers would load it too, and its factors would become sites."""
    dense = build("llama")
    dense.save_pretrained(tmp_path / "both")
    adapted = peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "both")
    adapted.save_pretrained(tmp_path / "alone")
    with pytest.raises(ModelError, match=r"an adapter \(adapter_config\.json\) beside.*merge"):
        load_model(Model("both", path=str(tmp_path / "both")))
    with pytest.raises(ModelError, match=r"an adapter without its model; merge"):
        load_model(Model("alone", path=str(tmp_path / "alone")))


def test_a_folder_with_weights_of_another_architecture_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    _change(tmp_path, {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)})
    with pytest.raises(
        ModelError, match=r"1 weights that LlamaForCausalLM has no place for.*q_norm"
    ):
        load_model(Model("other", path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "codegen"])
def test_masks_that_old_files_hold_are_no_weights(kind: str, tmp_path: Path) -> None:
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 256, 256)
    masks = {
        "attn.bias": mask,
        "attn.masked_bias": torch.tensor(-1e4),
        "attn.causal_mask": mask.clone(),
    }
    _change(tmp_path, {f"transformer.h.0.{name}": mask for name, mask in masks.items()})
    assert load_model(Model("old", path=str(tmp_path), dtype=Dtype.float32)) is not None


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(file: str, tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "tiny", tmp_path / "tiny")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "tiny" / file).write_text(pointer)
    source = Model("tiny", path=str(tmp_path / "tiny"))
    load = load_model if file == "model.safetensors" else load_tokenizer
    with pytest.raises(StorageError, match=rf"{file} is a pointer of Git LFS.*git lfs pull"):
        load(source)


def test_a_tokenizer_in_the_form_of_sentencepiece_loads(tmp_path: Path) -> None:
    """Old Llama models are published like this. SentencePiece itself gives the same tokens."""
    shutil.copytree(shared("models", "stories260K"), tmp_path / "old")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little cat.\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "old" / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "old" / "tokenizer.json").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(Model("old", path=str(tmp_path / "old")))
    whole = sentencepiece.SentencePieceProcessor(str(tmp_path / "old" / "tokenizer.model"))
    line = "Once upon a little cat."
    assert loaded(line, add_special_tokens=False)["input_ids"] == whole.encode(line)


@pytest.mark.parametrize("name", ["n_positions", "max_position_embeddings", "text_config"])
def test_the_context_has_many_names(name: str, tmp_path: Path) -> None:
    inner = {"max_position_embeddings": 77}
    config = {"text_config": inner} if name == "text_config" else {name: 77}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_of(str(tmp_path)) == 77


def _change(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})
