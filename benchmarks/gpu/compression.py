"""Compression of a model of a known shape, stage by stage, against a training step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.card import multiplications_per_second
from benchmarks.gpu.setting import Setting, Table
from iosvd.allocation import LossAware, Spectral, Uniform
from iosvd.cache.calibration import Calibration
from iosvd.cache.spectra import Factorized
from iosvd.correction import Anchored
from iosvd.method import Goal, Method
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import compress_to, spectra_for
from iosvd.quantization import LossAwareRemap
from iosvd.statistics.collect import collect
from iosvd.statistics.needs import Needs
from iosvd.statistics.planning import outline_of
from iosvd.system.timing import Stage, measured
from iosvd.whitening import Input, InputOutput

METHODS = {
    "svd_llm": Method(Input(), Uniform()),
    "io_svd": Method(InputOutput(), LossAware()),
    "io_svd_spectral": Method(InputOutput(), Spectral()),
    "io_svd_plus": Method(InputOutput(), LossAware(), quantization=LossAwareRemap()),
    "io_svd_anchored": Method(InputOutput(), Spectral(), Anchored()),
}
PROTOCOL_WINDOWS = 256
STAGES = ("statistics", "factorization", "allocation", "correction", "quantization")


def compression(setting: Setting) -> list[Table]:
    """Measure every method; the variants of IO-SVD share their spectra."""
    tokens = setting.tokens()
    step = training_step(setting, tokens)
    rates = (
        multiplications_per_second(setting, setting.dtype),
        multiplications_per_second(setting, torch.float32),
    )
    spectra = io_spectra(setting, tokens)
    rows, scaled = [], []
    for name, method in METHODS.items():
        model = setting.model()
        calibration = Calibration.of(model, tokens, batch_size=1)
        expected = expected_seconds(model, tokens, method, rates)
        given = spectra if isinstance(method.whitening, InputOutput) else None
        stages = dict(compress_to(Goal(setting.size.ratio), method, calibration, given).stages)
        if given is not None and method.allocation.needs == Needs():
            stages["statistics"] = statistics(setting, tokens, method)
        rows.append(_row(name, stages, expected, step))
        scaled.append(_scaled(name, stages, setting))
        del model, calibration
    return [
        Table(f"Compression, {setting.size.name}", rows, _notes(setting, step)),
        Table(f"The same for all of {setting.size.name}", scaled, _formula(setting)),
    ]


def training_step(setting: Setting, tokens: Tensor) -> Stage:
    """Measure forward and backward, with the gradients of all weights."""
    model = setting.model().train()

    def step(windows: Tensor) -> None:
        for batch in windows.split(1):
            batch = batch.to(setting.device)
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            model.zero_grad()

    step(tokens[:1])
    with measured() as took:
        step(tokens)
    return took()


def statistics(setting: Setting, tokens: Tensor, method: Method) -> Stage:
    """Measure the statistics of a method alone."""
    model, needs = setting.model(), method.whitening.needs | method.allocation.needs
    with measured() as took:
        collect(model, tokens, find_sites(model, SiteSelection()), needs, 1)
    return took()


def expected_seconds(
    model: PreTrainedModel, tokens: Tensor, method: Method, rates: tuple[float, float]
) -> float:
    """Return the seconds of the statistics' counted products at the card's rates."""
    needs: Needs = method.whitening.needs | method.allocation.needs
    work = outline_of(model, SiteSelection(), tokens.shape[1]).statistics(needs, tokens.shape[1])
    return tokens.numel() * (work.model / rates[0] + work.sums / rates[1])


def io_spectra(setting: Setting, tokens: Tensor) -> Factorized:
    """Return spectra that serve every variant of IO-SVD: scored, and to io_svd_plus's ranks."""
    calibration = Calibration.of(setting.model(), tokens, batch_size=1)
    return spectra_for(Goal(setting.size.ratio), METHODS["io_svd_plus"], calibration)


def _row(name: str, stages: Mapping[str, Stage], expected: float, step: Stage) -> dict[str, str]:
    whole = sum(stage.seconds for stage in stages.values())
    peak = max(stage.peak_bytes for stage in stages.values())
    collected = stages["statistics"].seconds
    return {
        "method": name,
        **{stage: f"{stages[stage].seconds:.2f} s" for stage in STAGES},
        "peak": f"{peak / 2**30:.2f} GiB",
        "whole / step": f"{whole / step.seconds:.2f}",
        "statistics, share of the ceiling": f"{expected / max(collected, 1e-9):.0%}",
    }


def _scaled(name: str, stages: Mapping[str, Stage], setting: Setting) -> dict[str, str]:
    """Return the minutes of all blocks and 256 windows."""
    blocks = setting.size.whole / setting.size.blocks
    windows = PROTOCOL_WINDOWS / setting.size.windows
    factor = {"factorization": blocks, "allocation": blocks, "quantization": blocks}
    minutes = {
        stage: stages[stage].seconds * factor.get(stage, blocks * windows) / 60 for stage in STAGES
    }
    return {
        "method": name,
        **{stage: f"{value:.2f} min" for stage, value in minutes.items()},
        "whole": f"{sum(minutes.values()):.2f} min",
    }


def _notes(setting: Setting, step: Stage) -> str:
    size = setting.size
    return (
        f"{size.blocks} blocks, {size.windows} windows of {size.length} random tokens, one window"
        f" per batch, {str(setting.dtype).removeprefix('torch.')}, ratio {size.ratio:g}. Step:"
        f" forward and backward of a training step over the same tokens, {step.seconds:.2f} s, peak"
        f" {step.peak_bytes / 2**30:.2f} GiB. Ceiling: the products of model and sums at the"
        " measured rates. The variants of IO-SVD share one set of spectra."
    )


def _formula(setting: Setting) -> str:
    size = setting.size
    return (
        f"Statistics and correction × {size.whole}/{size.blocks} blocks ×"
        f" {PROTOCOL_WINDOWS}/{size.windows} windows; factorisation, allocation and quantisation"
        f" × {size.whole}/{size.blocks} blocks. Embeddings and head are counted with the blocks."
    )
