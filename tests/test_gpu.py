"""The same results on a GPU; run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build
from test_inference import low_rank_
from torch.testing import assert_close

from experiments.small_models import small_model
from iosvd.allocation import LossAware
from iosvd.correction import Anchored
from iosvd.grams import add_lower_gram_
from iosvd.inference.prepare import prepare_for_generation
from iosvd.layers.int8 import Code
from iosvd.method import Method
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.models.visiting import visit_
from iosvd.pipeline import compress
from iosvd.quantization import Axis, Half, LossAwareRemap, Quantization, Remap, RoundToNearest
from iosvd.statistics.collect import collect
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.needs import Needs
from iosvd.whitening import InputOutput

pytestmark = pytest.mark.gpu
TOKENS = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(1))


def test_statistics_agree_with_the_cpu() -> None:
    needs = Needs(True, True, KLMetric(), gradient_windows=8)
    found = {}
    for device in ("cpu", "cuda"):
        model = build("llama").to(device)
        found[device] = collect(model, TOKENS, find_sites(model, SiteSelection()), needs)
    for name, on_gpu in found["cuda"].items():
        for field in ("input_metric", "input_magnitude", "kl_metric", "gradient"):
            value = getattr(on_gpu, field)
            assert value.device.type == "cuda"
            assert_close(value.cpu(), getattr(found["cpu"][name], field), rtol=1e-3, atol=1e-5)


def test_a_refit_on_a_gpu_keeps_every_tensor_there() -> None:
    model = build("llama", torch.bfloat16).to("cuda")
    method = Method(InputOutput(), LossAware(), Anchored())
    result = compress(model, TOKENS, method=method, ratio=0.5)
    assert {tensor.device.type for tensor in result.model.state_dict().values()} == {"cuda"}
    assert torch.isfinite(model(input_ids=TOKENS.cuda()).logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_latent_caches_is_the_same(dtype: torch.dtype) -> None:
    model = small_model("llama").to("cuda", dtype)
    model.model.rotary_emb.float()
    low_rank_(model)
    prepared = prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    found = [
        each.generate(
            torch.arange(3, 15, device="cuda").view(2, 6),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        for each, options in (
            (model, {}),
            (prepared, {}),
            (prepared, {"cache_implementation": "static"}),  # Compiled by transformers.
        )
    ]
    first = [torch.stack(each.logits)[0] for each in found]
    for other in first[1:]:
        assert_close(first[0], other, rtol=0, atol=1e-4 if dtype is torch.float32 else 0.1)
    if dtype is torch.float32:
        assert torch.equal(found[0].sequences, found[1].sequences)
        assert torch.equal(found[0].sequences, found[2].sequences)


def test_a_run_starts_before_the_gpu_is_in_use(tmp_path: Path) -> None:
    """In a process of its own: here another test may have initialised CUDA."""
    pytest.importorskip("hydra")  # The command needs it; a bare machine may lack it.
    command = [sys.executable, "experiments/compress.py", f"runtime.results={tmp_path}"]
    short = ["method=io_svd", "calibration.windows=8", "eval.windows=4", "runtime.device=cuda"]
    root = Path(__file__).parents[1]
    subprocess.run([*command, *short], cwd=root, check=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_model_on_a_gpu_is_compressed_there(dtype: torch.dtype) -> None:
    model = build("llama", dtype).to("cuda")
    result = compress(model, TOKENS, ratio=0.6, method=Method(InputOutput(), LossAware()))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert result.plan.ratio_achieved <= 0.6
    assert torch.isfinite(model(input_ids=TOKENS.cuda()).logits).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "quantization",
    [Half(Axis.channel), Half(), Remap(Code.dynamic), LossAwareRemap(), RoundToNearest(8)],
    ids=str,
)
def test_quantised_layers_agree_with_the_cpu(
    quantization: Quantization, dtype: torch.dtype
) -> None:
    logits = {}
    for device in ("cpu", "cuda"):
        result = compress(
            build("llama", dtype),
            TOKENS,
            ratio=0.6,
            method=Method(InputOutput(), LossAware(), quantization=quantization),
        )  # On the CPU: on the GPU rounding could choose other ranks.
        model = result.model.to(device)
        with torch.no_grad():
            logits[device] = model(input_ids=TOKENS.to(device)).logits.cpu().float()
    assert_close(logits["cuda"], logits["cpu"], rtol=2e-2, atol=2e-2)
    on_gpu = compress(
        build("llama", dtype).to("cuda"),
        TOKENS,
        ratio=0.6,
        method=Method(InputOutput(), LossAware(), quantization=quantization),
    )
    assert {t.device.type for t in on_gpu.model.state_dict().values()} == {"cuda"}
    assert on_gpu.plan.ratio_achieved <= 0.6
    assert torch.isfinite(on_gpu.model(input_ids=TOKENS.cuda()).logits).all()


def test_blocks_in_main_memory_change_nothing_but_memory() -> None:
    small, large = build("llama"), build("llama").cuda()
    visit_(small, torch.device("cuda"))
    assert {p.device.type for p in small.model.layers.parameters()} == {"cpu"}
    one, two = (
        compress(model, TOKENS, method="io_svd_plus", ratio=0.6, batch_size=4)
        for model in (small, large)
    )
    assert one.plan.ranks == two.plan.ranks
    with torch.no_grad():
        logits = [result.model(input_ids=TOKENS.cuda()).logits for result in (one, two)]
    assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert {p.device.type for p in small.model.layers.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sums_of_products_are_as_good_as_float32(dtype: torch.dtype) -> None:
    rows = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = torch.zeros(512, 512, device="cuda")
    add_lower_gram_(total, rows.cuda())
    exact = (rows.double().T @ rows.double()).tril()
    error = (total.cpu().double().tril() - exact).norm() / exact.norm()
    assert error < 2e-6


def test_sums_in_main_memory_change_rounding_only() -> None:
    model = build("llama").cuda()
    sites = find_sites(model, SiteSelection())
    tokens = torch.randint(0, 31, (6, 12), generator=torch.Generator().manual_seed(1))
    needs = Needs(input_metric=True, kl_metric=KLMetric(5), gradient_windows=10**9)
    here = collect(model, tokens, sites, needs)
    there = collect(model, tokens, sites, needs, on_cpu=True)
    for name in sites:
        for field in ("input_metric", "kl_metric", "gradient"):
            found = there[name].need(field)
            assert found.device.type == "cpu"
            assert_close(found, here[name].need(field).cpu(), rtol=1e-4, atol=1e-6)
