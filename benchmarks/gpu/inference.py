"""Prefill, decoding and single layers: dense against low rank and int8 rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks import latency
from benchmarks.gpu.setting import Setting, Table
from iosvd.inference.prepare import prepare_for_generation
from iosvd.layers.modules import LowRankLinear
from iosvd.models.sites import SiteSelection, find_sites

RATIO = 0.6
BATCHES = (1, 64)
STEPS = 8


def low_rank_(model: PreTrainedModel, multiple: int) -> PreTrainedModel:
    """Put random low-rank layers in place of all sites, with ranks that are such multiples."""
    for name, site in find_sites(model, SiteSelection()).items():
        m, n = site.weight.shape
        rank = max(1, int(RATIO * m * n / (m + n)))
        rank = max(multiple, rank // multiple * multiple)
        place = {"device": site.weight.device, "dtype": site.weight.dtype}
        layer = LowRankLinear(n, m, rank, **place)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight.normal_(std=n**-0.5)
            layer.left.normal_(std=rank**-0.5)
        model.set_submodule(name, layer)
    return model


@torch.inference_mode()
def decoding(setting: Setting) -> list[Table]:
    """Measure prefill and decoding."""
    kinds: dict[str, Callable[[], PreTrainedModel]] = {
        "dense": setting.model,
        "low rank": lambda: low_rank_(setting.model(), 1),
        "low rank, ranks of 8": lambda: low_rank_(setting.model(), 8),
        "packed": lambda: prepare_for_generation(low_rank_(setting.model(), 8)),
        "packed, V latent": lambda: prepare_for_generation(
            low_rank_(setting.model(), 8), v_cache="latent"
        ),
        "packed, KV latent": lambda: prepare_for_generation(
            low_rank_(setting.model(), 8), v_cache="latent", k_cache="latent"
        ),
    }
    rows = []
    for name, build in kinds.items():
        measure = partial(_model_row, setting, build)
        rows.append(setting.row({"model": name}, 10.0, measure))
    notes = (
        f"{setting.size.blocks} blocks, ratio {RATIO:g}; prefill of {setting.size.length // 4}"
        " tokens, then one token at a time with the cache of all before it. Eager calls: at batch 1"
        " a GPU waits for Python most of the time. `make figure4` is the paper's setting."
    )
    return [Table("Decoding", rows, notes)]


def _model_row(setting: Setting, build: Callable[[], PreTrainedModel]) -> dict[str, str]:
    model = build()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    row = {"weights": f"{weights / 2**20:.0f} MiB"}
    for batch in BATCHES:
        prefill, step, peak = _measured(setting, model, batch)
        row[f"prefill, batch {batch}"] = f"{1e3 * prefill:.1f} ms"
        row[f"decode, batch {batch}"] = f"{1e3 * step:.2f} ms"
        row[f"peak, batch {batch}"] = peak
    return row


def _measured(setting: Setting, model: PreTrainedModel, batch: int) -> tuple[float, float, str]:
    """Return the seconds of prefill and of one step, and the peak memory."""
    length = setting.size.length // 4
    tokens = torch.randint(0, setting.size.vocabulary, (batch, length), device=setting.device)
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    prefill = setting.seconds(lambda: model(input_ids=tokens, logits_to_keep=1, use_cache=True))
    cache = DynamicCache()
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    step = setting.seconds(lambda: _steps(model, cache, tokens[:, :1])) / STEPS
    peak = "–"
    if setting.cuda:
        peak = f"{torch.cuda.max_memory_allocated(setting.device) / 2**30:.2f} GiB"
    return prefill, step, peak


def _steps(model: PreTrainedModel, cache: DynamicCache, token: Tensor) -> None:
    for _ in range(STEPS):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    cache.crop(-STEPS)


def single_layers(setting: Setting) -> list[Table]:
    """Measure one layer, dense and of low rank, in 16 bits, int8 and four bits."""
    width = setting.size.hidden
    rows = latency.measure(setting.dtype, str(setting.device), width, width // 4)
    notes = (
        f"{width} × {width}, rank {width // 4}; milliseconds of one eager call, and the ratio to"
        " dense. At batch 1 the launch of kernels may take longer than the bytes."
    )
    return [Table("One layer", rows, notes)]
