"""Compression of a model of a known shape, stage by stage, against a training step."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.card import multiplications_per_second
from benchmarks.gpu.setting import InMemory, Setting, Table
from iosvd.allocation import LossAware, Spectral, Uniform
from iosvd.cache.calibration import Calibration
from iosvd.correction import Anchored
from iosvd.method import Goal, Method
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import compress_to
from iosvd.quantization import LossAwareRemap
from iosvd.statistics.collect import collect
from iosvd.statistics.needs import Needs
from iosvd.statistics.planning import Outline, outline_of
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
    """Measure every method; they share statistics and spectra as runs of a sweep do."""
    tokens, store = setting.tokens(), InMemory()
    step = training_step(setting, tokens)
    rates = Rates(
        multiplications_per_second(setting, setting.dtype),
        multiplications_per_second(setting, torch.float32, tf32=setting.cuda),
    )
    shapes = outline_of(setting.model(), SiteSelection(), tokens.shape[1])
    # Methods with the same needs share one measurement.
    collecting = functools.cache(functools.partial(collected, setting, tokens))
    rows, scaled = [], []
    for name, method in METHODS.items():
        found: dict[str, Stage] = {}

        def measured_row(
            method: Method = method, found: dict[str, Stage] = found
        ) -> dict[str, str]:
            needs = method.whitening.needs | method.allocation.needs
            found |= stages_of(setting, method, tokens, store)
            # A cached statistic is charged an equal share of its pass: measured alone, it is exact.
            found["statistics"] = collecting(needs)
            return _row(found, expected_seconds(shapes, tokens, needs, rates), step)

        rows.append(setting.row({"method": name}, 30.0, measured_row))
        if found:
            gradient = Stage(0.0, 0)
            if method.quantization.rounds:
                gradient = collecting(Needs(gradient_windows=len(tokens)))
            scaled.append({"method": name, **_scaled(found, gradient, setting)})
    return [
        Table(f"Compression, {setting.size.name}", rows, _notes(setting, step)),
        Table(f"The same for all of {setting.size.name}", scaled, _formula(setting)),
    ]


@dataclass(frozen=True)
class Rates:
    """Measured multiplications per second."""

    model: float  # In the model's dtype.
    sums: float  # In float32, on a GPU with TF32.


def stages_of(
    setting: Setting, method: Method, tokens: Tensor, store: InMemory
) -> dict[str, Stage]:
    """Compress a new model and return what each stage took."""
    calibration = Calibration.of(
        setting.model(), tokens, batch_size=1, store=store, identity="the report's model"
    )
    return dict(compress_to(Goal(setting.size.ratio), method, calibration).stages)


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


def collected(setting: Setting, tokens: Tensor, needs: Needs) -> Stage:
    """Measure one pass of statistics."""
    model = setting.model()
    with measured() as took:
        collect(model, tokens, find_sites(model, SiteSelection()), needs, 1)
    return took()


def expected_seconds(shapes: Outline, tokens: Tensor, needs: Needs, rates: Rates) -> float:
    """Return the seconds of the statistics' counted products at the card's rates."""
    work = shapes.statistics(needs, tokens.shape[1])
    return tokens.numel() * (work.model / rates.model + work.sums / rates.sums)


def _row(stages: Mapping[str, Stage], expected: float, step: Stage) -> dict[str, str]:
    whole = sum(stage.seconds for stage in stages.values())
    peak = max(stage.peak_bytes for stage in stages.values())
    return {
        **{stage: f"{stages[stage].seconds:.2f} s" for stage in STAGES},
        "peak": f"{peak / 2**30:.2f} GiB",
        "whole / step": f"{whole / step.seconds:.2f}",
        "statistics, share of the ceiling": f"{expected / stages['statistics'].seconds:.0%}",
    }


def _scaled(stages: Mapping[str, Stage], gradient: Stage, setting: Setting) -> dict[str, str]:
    """Return the minutes of all blocks and 256 windows."""
    blocks = setting.size.whole / setting.size.blocks
    both = blocks * PROTOCOL_WINDOWS / setting.size.windows
    seconds = {name: stages[name].seconds for name in STAGES}
    fixed = min(seconds["factorization"], seconds["correction"])
    again = min(gradient.seconds, seconds["quantization"])
    minutes = {
        "statistics": both * seconds["statistics"],
        "factorization": blocks * seconds["factorization"],
        "allocation": blocks * seconds["allocation"],
        "correction": blocks * fixed + both * (seconds["correction"] - fixed),
        "quantization": both * again + blocks * (seconds["quantization"] - again),
    }
    shown = {name: f"{value / 60:.2f} min" for name, value in minutes.items()}
    return {**shown, "whole": f"{sum(minutes.values()) / 60:.2f} min"}


def _notes(setting: Setting, step: Stage) -> str:
    size = setting.size
    return (
        f"{size.blocks} blocks, {size.windows} windows of {size.length} random tokens, one window"
        f" per batch, {str(setting.dtype).removeprefix('torch.')}, ratio {size.ratio:g}. Step:"
        f" forward and backward of a training step over the same tokens, {step.seconds:.2f} s, peak"
        f" {step.peak_bytes / 2**30:.2f} GiB. Ceiling: the products of model and sums at the"
        " measured rates."
    )


def _formula(setting: Setting) -> str:
    size = setting.size
    blocks = f"× {size.whole}/{size.blocks} blocks"
    return (
        "Statistics, the gradient of the quantisation, and the correction but for one"
        f" factorisation {blocks} × {PROTOCOL_WINDOWS}/{size.windows} windows; the rest {blocks}."
        " Embeddings and head are scaled with the blocks, so this is too much."
    )
