"""Answers, their figures, and the measurement of generation, at a tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from test_inference import low_rank_
from transformers import PreTrainedTokenizerBase

import iosvd
from benchmarks.inference import __main__ as bench
from benchmarks.inference import report
from benchmarks.inference.limits import DeviceLimits, StepCost, call_cost
from benchmarks.inference.variants import VARIANTS, int8_, random_source
from experiments import generate as command
from experiments.small_models import small_model
from iosvd.errors import ConfigError, ModelError
from iosvd.inference.memory import cache_bytes_per_token, weight_bytes
from iosvd.inference.session import Sampling, answer
from iosvd.layers.checkpoint import mark_compressed_, save
from iosvd.layers.replacement import compressed_layers
from iosvd.models.loading import ASSETS, Model, load_model, load_tokenizer

TINY = Model("tiny", path=str(ASSETS / "tiny"), embedded=True, seq_len=256)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(TINY)


def test_an_answer_is_what_generate_returns(tokenizer: PreTrainedTokenizerBase) -> None:
    dense = load_model(TINY)
    model = iosvd.prepare_for_generation(low_rank_(load_model(TINY)), "latent", "latent")
    for each in (dense, model):
        found = answer(each, tokenizer, "def main():", 12)
        tokens = tokenizer("def main():", return_tensors="pt")["input_ids"]
        whole = each.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert found.text == tokenizer.decode(whole[0, tokens.shape[1] :], skip_special_tokens=True)
        assert (found.prompt_tokens, found.new_tokens) == (tokens.shape[1], 12)
        assert found.weight_bytes == weight_bytes(each)
        assert found.prefill_seconds > 0 and found.decode_seconds > 0
        assert "12 tokens" in str(found)
    # All but the last token are cached.
    assert found.cache_bytes == cache_bytes_per_token(model) * (tokens.shape[1] + 11)
    sampled = {
        answer(model, tokenizer, "def main():", 12, Sampling(5.0, seed)).text for seed in (0, 0, 1)
    }
    assert len(sampled) == 2


def test_prompts_that_cannot_be_answered_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_model(TINY)
    with pytest.raises(ModelError, match=r"context of the model is 256.*take new=2\d\d"):
        answer(model, tokenizer, "def main():", 4000)
    empty = type(tokenizer("a", return_tensors="pt"))({"input_ids": torch.zeros(1, 0)})
    with pytest.raises(ModelError, match="the prompt has no tokens"):
        answer(model, lambda *_, **__: empty, "", 4)  # type: ignore[arg-type]


def saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Save a compressed checkpoint; return the options that name it."""
    model = low_rank_(load_model(TINY))
    mark_compressed_(model)
    save(model, folder, tokenizer=tokenizer)
    return ["model=local", f"model.path={folder}", "model.dtype=float32"]


def test_a_checkpoint_answers_beside_the_dense_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    named = saved(tmp_path / "small", tokenizer)
    dense = f"compare={ASSETS / 'tiny'}"
    command.generate([*named, dense, "prompt=import", "new=5", "inference=kv_latent"])
    shown = capsys.readouterr().out
    assert "── small" in shown and "── dense" in shown and shown.count("5 tokens") == 2
    command.generate([*named, "prompt=import", "new=5", "inference.v_cache=latent"])
    plain = capsys.readouterr().out
    assert "──" not in plain
    answers = [text.split("\n[")[0].partition("\n")[2].strip() for text in (shown, plain)]
    assert answers[0] == answers[1]
    with pytest.raises(ConfigError, match="compare=FOLDER"):
        command.generate([*named, "compare=true", "prompt=import"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("new=0", "new=0 is below 1"),
        ("new=many", "new is a whole number"),
        ("temperature=-1", "temperature=-1 below 0"),
        ("inference=fast", "inference"),
        ("inference.v_cache=half", "v_cache"),
        ("inference.w_cache=full", "w_cache"),
    ],
)
def test_wrong_options_are_one_line(option: str, message: str) -> None:
    with pytest.raises(iosvd.IosvdError, match=message):
        command.generate(["model=tiny", "prompt=a", option])


def test_a_model_is_compressed_and_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", iter(["import\n", "\n", "def\n"]))
    options = [f"runtime.results={tmp_path}", "method=svd_llm", "calibration.windows=4", "new=3"]
    command.generate([*options, "compare=true"])
    shown = capsys.readouterr().out
    assert shown.count("3 tokens") == 4 and shown.count("── dense") == 2
    assert "svd_llm[" not in shown and "── svd_llm at 0.8" in shown


def test_generation_is_measured_at_a_tiny_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    options = ["shape=small", "ratio=0.5", "batch=1,2", "prompt=8", "new=4", "rounds=1"]
    page = bench.benchmark([*options, "device=cpu"])
    (written,) = (tmp_path / "tables").glob("inference-small-0.5-cpu.csv")
    frame = pandas.read_csv(written).set_index(["batch", "model"])
    assert set(frame.index.get_level_values("model")) == set(VARIANTS)
    assert (frame.loc[(slice(None), "dense"), "decode / dense"] == 1).all()
    assert (frame.loc[(slice(None), "low rank"), "weights MiB"] < frame["weights MiB"].max()).all()
    cache = frame["cache MiB"]
    length = 8 + 2 + 4  # With the steps before the clock counts.
    assert cache[1, "dense"] * 2**20 == 2 * 2 * 2 * 16 * length * 4
    ranks = 2 * int(0.5 * 64 * 32 / 96)  # Of keys and values.
    assert cache[1, "+ KV latent"] * 2**20 == 2 * ranks * length * 4
    assert (tmp_path / "figures" / "inference-small-0.5-cpu.png").exists()
    assert "commit" in page and "GB/s" in page


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("batch=0", "at least 1"),
        ("new=x", "whole numbers"),
        ("ratio=0.6,0.4", "ratio a number"),
        ("ratio=7", "outside"),
        ("shape=huge", "not one of llama2_7b"),
        ("compiled=yes", "neither true nor false"),
        ("dtype=int8", "dtype=int8 is not one of float16"),
        ("batchs=64", "a shape has no option batchs"),
        ("batch=1000000000", r"small and its cache take .* GiB are free on cpu"),
    ],
)
def test_wrong_measurements_are_one_line(option: str, message: str) -> None:
    with pytest.raises(iosvd.IosvdError, match=message):
        bench.benchmark(["shape=small", "device=cpu", option])


def test_a_limit_is_bytes_or_operations() -> None:
    assert DeviceLimits(10, 100).seconds(StepCost(20, 50)) == 2
    assert DeviceLimits(10, 100).seconds(StepCost(20, 500)) == 5


@pytest.mark.parametrize("caches", [(), ("latent",), ("latent", "latent")])
def test_a_call_cost_its_weights_and_its_cache(caches: tuple[str, ...]) -> None:
    model = low_rank_(small_model("llama", tie_word_embeddings=False))
    embeddings = model.get_input_embeddings().weight  # type: ignore[union-attr]
    prepared = iosvd.prepare_for_generation(model, *caches)
    needed = call_cost(prepared, batch=3, new=1, cached=20)
    cached = cache_bytes_per_token(prepared)
    apart = embeddings.numel() * 4  # type: ignore[operator]
    assert needed.bytes == weight_bytes(prepared) - apart + 60 * cached
    # Twice the entries of all products for each of three tokens, and attention beside.
    weights = sum(p.numel() for p in prepared.parameters() if p.dim() > 1) - apart // 4
    attention = needed.operations - 3 * 2 * weights
    heads, width = 4, 64
    ranks = [layer.rank for n, layer in compressed_layers(prepared).items() if n.endswith("v_proj")]
    keys = [layer.rank for n, layer in compressed_layers(prepared).items() if n.endswith("k_proj")]
    per_token = 4 * 2 * width  # Scores of four layers.
    per_token += sum(2 * heads * rank for rank in ranks) if caches else 4 * 2 * width
    per_token += sum(2 * rank * 2 * 16 for rank in keys) if len(caches) == 2 else 0
    assert attention == 3 * 20 * per_token


def test_int8_rows_are_the_same_model_rounded() -> None:
    model, rounded = (low_rank_(small_model("llama")) for _ in range(2))
    int8_(rounded)
    tokens = torch.arange(12)[None]
    one, other = (m(input_ids=tokens).logits for m in (model, rounded))
    off = float(((one - other).norm() / one.norm()).detach())
    assert 0 < off < 0.05
    assert weight_bytes(rounded) < 0.7 * weight_bytes(model)


def test_a_random_shape_has_the_ranks_of_its_ratio() -> None:
    model = random_source("small", 0.5, 32, torch.device("cpu"), torch.float32).build()
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.rank == int(0.5 * 64 * 128 / 192)
    assert torch.isfinite(model(input_ids=torch.arange(6)[None]).logits).all()


def test_the_papers_points_are_those_of_the_figure() -> None:
    points = pandas.read_csv(report.PUBLISHED).set_index("variant")
    assert points.loc["dense", "peak_gib"] == 77.6
    assert points.loc["+ KV latent", ["peak_gib", "decode_ratio"]].tolist() == [23.1, 4.34]
