"""What is planned from shapes alone is what is then done."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build
from test_execution import overrides, run, source  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

from experiments import plan
from experiments.small_models import small_model
from iosvd.budget import Shape
from iosvd.errors import ConfigError
from iosvd.models.loading import Dtype, Model
from iosvd.models.sites import (
    SiteSelection,
    covered_share,
    decoder_blocks,
    find_sites,
    shared_inputs,
)
from iosvd.runs.config import compose_run
from iosvd.runs.steps import loaded, memory_use, plan_statistics
from iosvd.statistics.fisher import FisherMetric, Labels
from iosvd.statistics.kl_metric import Estimator, KLMetric
from iosvd.statistics.memory import Activations, sums_limit
from iosvd.statistics.needs import Needs
from iosvd.statistics.planning import outline, outline_of
from iosvd.system.machine import GIB, release_memory, resident_bytes
from iosvd.windows import as_windows

IO_SVD = Needs(input_metric=True, kl_metric=KLMetric(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outline_without_weights_is_that_of_the_model(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    found = outline(Model("x", path=str(tmp_path), dtype=Dtype.float32), 16)
    assert found == outline_of(model, SiteSelection(), 16)
    sites = find_sites(model, SiteSelection())
    tokens = torch.zeros(1, 8, dtype=torch.long)
    assert found.shared == shared_inputs(model, as_windows(tokens), sites)
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.weight_bytes == bytes_
    assert len(decoder_blocks(model)) == 2


def test_passes_are_as_few_as_the_limit_allows() -> None:
    found = outline_of(build("llama"), SiteSelection(), 16)
    (whole,) = found.passes(IO_SVD, float("inf"))
    halves = found.passes(IO_SVD, whole // 2 + 100)
    assert sum(halves) >= whole and max(halves) <= whole // 2 + 100
    assert len(found.passes(IO_SVD, 0)) == len(found.sites)
    assert found.passes(Needs(), 0) == []


def test_multiplications_are_counted_by_hand() -> None:
    """Llama of the tests: hidden 16, grouped keys and values of 8, 24 inside, vocabulary 31."""
    found = outline_of(build("llama"), SiteSelection(), 16)
    weights = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    assert found.forward == weights + 16 * 31
    inputs = 2 * (16**2 + 16**2 + 16**2 + 24**2)  # qkv; o; gate and up; down.
    outputs = 2 * (16**2 + 2 * 8**2 + 16**2 + 2 * 24**2 + 16**2)
    work = found.statistics(IO_SVD, 8)
    assert work.model == 2 * found.forward + weights
    assert work.sums == 5 / 8 * (inputs + outputs)
    exact = Needs(kl_metric=KLMetric(5, estimator=Estimator.exact))
    assert found.statistics(exact, 8).model == 6 * found.forward + weights
    assert found.statistics(exact, 8).sums == 5 / 8 * 5 * outputs
    scored = found.statistics(Needs(gradient_windows=1), 8)
    assert (scored.model, scored.sums) == (2 * found.forward + weights, weights)
    sampled = Needs(fisher_metric=FisherMetric(Labels.sampled))
    assert found.statistics(sampled, 8).total == 2 * found.forward + weights + 5 / 8 * outputs
    assert found.statistics(Needs(), 8).total == 0


def test_activations_are_those_of_one_block_and_the_inputs_of_all() -> None:
    block = (Shape(64, 64), Shape(256, 64), Shape(64, 256))
    one, eight = (Activations((block,) * n, 64, 100, tokens=512, entry_bytes=2) for n in (1, 8))
    assert eight.bytes(IO_SVD) - one.bytes(IO_SVD) == 7 * 512 * 64 * 2
    assert eight.bytes(Needs(input_metric=True)) == one.bytes(Needs(input_metric=True))
    assert eight.bytes(Needs(input_metric=True)) < one.bytes(IO_SVD)
    twice = replace(eight, tokens=1024)
    assert twice.bytes(IO_SVD) == 2 * eight.bytes(IO_SVD)
    assert eight.bytes(IO_SVD | Needs(gradient_windows=1)) > eight.bytes(IO_SVD)


def test_the_limit_is_what_is_left_of_the_stated_memory() -> None:
    cpu = torch.device("cpu")
    taken = resident_bytes()
    assert sums_limit(4.0, [cpu], 2 * GIB) == pytest.approx(2 * GIB - taken, abs=2**26)
    alone, shared = (sums_limit(None, [cpu], 0, workers) for workers in (1, 4))
    assert shared == pytest.approx(alone / 4, rel=0.1)


def test_a_run_passes_as_often_as_was_planned(source: Path) -> None:  # noqa: F811
    """Little memory is stated as what this process has, and 20 kB of sums."""
    asked = run(source)
    planned = plan_statistics(asked, torch.device("cpu"))
    assert len(planned.passes) == 1
    stated = (resident_bytes() + planned.activations + 20_000) / GIB
    little = run(source, f"runtime.memory_gib={stated}")
    model = loaded(little)
    memory = memory_use(little, model, as_windows(torch.zeros(8, 16, dtype=torch.long)))
    assert memory.limit_bytes == pytest.approx(20_000, abs=2**25)


def test_the_plan_is_printed_before_anything_is_loaded(
    source: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (source / "small" / "model.safetensors").unlink()
    text = plan.plan(overrides(source, "runtime.batch_tokens=1024"))
    for line in (
        "weights +0.00 GiB",
        "passes over the calibration set +1,",
        "factorization +about",
    ):
        assert re.search(line, text), text
    few = plan.plan(overrides(source, "runtime.memory_gib=0.001"))
    assert "the sums of one site exceed what is left" in few


def test_a_named_card_has_its_published_peaks(source: Path) -> None:  # noqa: F811
    found = {}
    for card in plan.CARDS:
        text = plan.plan(overrides(source, f"card={card}"))
        assert f"on {card}" in text and f"({plan.CARDS[card].memory_gib:g} GiB)" in text
        (line,) = [line for line in text.splitlines() if line.startswith("statistics")]
        assert "at least" in line
        found[card] = plan.CARDS[card].speed(torch.float16, torch.float64)
    assert plan.CARDS["rtx4090"].speed(torch.float16, torch.float32).factorization > 1e13
    # 989 TFLOP/s are half as many multiplications.
    assert found["h100"].model == pytest.approx(494.5e12)
    assert found["rtx4090"].factorization < found["a100"].factorization / 10
    apart = plan.plan(overrides(source, "card=h100", "runtime.metrics_on_cpu=true"))
    assert "in all, on cpu" in apart and "in all, on h100" in plan.plan(
        overrides(source, "card=h100")
    )
    with pytest.raises(ConfigError, match="card=v100 is none of a100, h100, rtx4090, rtx3090"):
        plan.plan(overrides(source, "card=v100"))


@pytest.mark.parametrize(
    ("memory", "shape", "visits", "passes"),
    [
        (24, (4096, 11008, 32), False, 14),
        (80, (5120, 13824, 40), False, 4),
        (12, (4096, 11008, 32), True, 11),
        (24, (5120, 13824, 40), True, 10),
    ],
    ids=["7B in 24 GB", "13B in 80 GB", "7B visits 12 GB", "13B visits 24 GB"],
)
def test_large_models_fit_the_gpus_that_people_have(
    memory: int, shape: tuple[int, int, int], visits: bool, passes: int, tmp_path: Path
) -> None:
    """By the plan: weights, one window of 2048 block by block, and the sums of several passes."""
    from transformers import LlamaConfig

    hidden, inner, layers = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=32_000,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    asked = compose_run(["model=llama_7b", f"model.path={tmp_path}", "dataset=wikitext2"])
    found = outline(asked.model, 2048)
    needs = asked.method.whitening.needs | asked.method.allocation.needs
    activations = found.activations.bytes(needs)
    weights = found.visiting_bytes if visits else found.weight_bytes
    limit = 0.9 * memory * 1e9 - weights - activations
    needed = found.passes(needs, limit)
    assert max(needed) <= limit
    assert len(needed) <= passes


def test_memory_in_small_pieces_goes_back_to_the_system() -> None:
    """The C library alone would keep what lies below the last piece that is in use."""
    release_memory()  # What other tests left would be used first.
    before = resident_bytes()
    pieces = [torch.ones(2**14) for _ in range(4000)]  # 250 MiB, each below the mapping threshold.
    last = torch.ones(2**14)
    held = resident_bytes() - before
    del pieces
    release_memory()
    assert held > 100 * 2**20
    assert resident_bytes() - before < held / 2
    assert float(last.sum()) == 2**14


@pytest.mark.parametrize("kind", ["mixtral", "bamba", "qwen3_next", "gpt2", "jetmoe"])
def test_architectures_are_planned_without_values(kind: str) -> None:
    """Routing, and some layers with a state, look at values, which the meta device has not."""
    model = small_model(kind)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    planned = outline_of(empty, SiteSelection(), 2048)
    sites = find_sites(model, SiteSelection())
    assert {n: (s.m, s.n) for n, s in planned.sites.items()} == {
        n: tuple(site.weight.shape) for n, site in sites.items()
    }
    assert planned.covered_share == pytest.approx(covered_share(model, sites))
    exact = shared_inputs(model, as_windows(torch.zeros(1, 8, dtype=torch.long)), sites)
    assert len(set(planned.shared.values())) >= len(set(exact.values()))  # At most too much.


def test_a_plan_counts_the_correction() -> None:
    lines = plan.plan(["method=io_svd_full", "card=h100"]).splitlines()
    (line,) = [line for line in lines if line.startswith("correction")]
    assert re.fullmatch(
        r"correction +at least [0-9.]+ (s|min), [0-9.]+ GiB for what is trained", line
    )
    assert not any(line.startswith("correction") for line in plan.plan([]).splitlines())
    uncounted = plan.plan(["method=asvd_public", "card=h100"])
    assert re.search("correction +not counted", uncounted)


def test_a_plan_says_what_a_ratio_refers_to() -> None:
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in plan.plan([]).splitlines())
    assert lines["what a ratio refers to"] == "100.0% of the weights of the decoder blocks"
