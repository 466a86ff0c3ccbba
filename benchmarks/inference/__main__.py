"""Dense, low-rank and latent-cache generation side by side: make bench-inference

    python -m benchmarks.inference shape=llama2_7b ratio=0.4 batch=1,64 prompt=1024 new=1024
    python -m benchmarks.inference model=smollm2_135m method=io_svd ratio=0.4 …

`shape` is one of benchmarks/inference/variants.py, with random weights; `model` is what a run
takes, and is compressed as that run does it. batch, prompt and new may be lists. Every variant is
visited once in each of `rounds`. threads: of the CPU; dtype: of a shape; compiled=true compiles the
step. Stops before it starts if the largest variant and its cache do not fit.
Writes results/tables/inference-<model>-<ratio>-<device>.md and .csv, and a figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import pandas
import torch

from benchmarks.inference.limits import DeviceLimits, StepCost, call_cost, measured_limits
from benchmarks.inference.report import write_report
from benchmarks.inference.timing import Timed, Workload, generation
from benchmarks.inference.variants import (
    DENSE,
    SHAPES,
    VARIANTS,
    Source,
    copies_of,
    dense_bytes,
    random_source,
)
from iosvd.budget import check_ratio
from iosvd.errors import ConfigError, exit_in_one_line
from iosvd.inference.memory import weight_bytes
from iosvd.models.loading import Dtype
from iosvd.runs.compressed import compressed_model
from iosvd.runs.config import compose_run
from iosvd.runs.steps import device_for
from iosvd.system.commands import arguments
from iosvd.system.logs import log_to_console
from iosvd.system.machine import GIB, free_bytes, release_memory
from iosvd.system.progress import track

OWN = {
    **{"batch": "1,16", "prompt": "128,1024", "new": "32", "rounds": "3", "threads": "0"},
    **{"dtype": "", "device": "auto", "compiled": "false", "shape": "", "ratio": "0.8"},
}


@dataclass(frozen=True)
class Options:
    """Workloads, rounds and device of a measurement."""

    loads: Sequence[Workload]
    rounds: int
    threads: int
    compiled: bool
    device: torch.device
    ratio: float


def benchmark(overrides: Sequence[str]) -> str:
    """Measure, write and return the page."""
    given = dict(line.partition("=")[::2] for line in overrides)
    own = {name: given.pop(name, default) for name, default in OWN.items()}
    options = _options(own)
    if options.threads:
        torch.set_num_threads(options.threads)
    source = _source(given, own, options)
    frame, limits = _measured(source, options)
    return write_report(frame, source, options.device, limits, list(overrides))


def _options(own: dict[str, str]) -> Options:
    try:
        batches, prompts, news = (
            [int(part) for part in own[name].split(",")] for name in ("batch", "prompt", "new")
        )
        rounds, threads, ratio = int(own["rounds"]), int(own["threads"]), float(own["ratio"])
    except ValueError as error:
        raise ConfigError(
            f"batch, prompt, new, rounds and threads are whole numbers, ratio a number: {error}"
        ) from None
    if min(rounds, *batches, *prompts, *news) < 1 or threads < 0:
        raise ConfigError("batch, prompt, new and rounds are at least 1, threads at least 0")
    check_ratio(ratio)
    if own["compiled"] not in ("true", "false"):
        raise ConfigError(f"compiled={own['compiled']} is neither true nor false")
    loads = [Workload(*values) for values in itertools.product(batches, prompts, news)]
    device = torch.device(device_for(own["device"]))
    return Options(loads, rounds, threads, own["compiled"] == "true", device, ratio)


def _source(given: dict[str, str], own: dict[str, str], options: Options) -> Source:
    longest = max(load.length for load in options.loads)
    if shape := own["shape"]:
        if shape not in SHAPES:
            raise ConfigError(f"shape={shape} is not one of {', '.join(SHAPES)}")
        if given:
            raise ConfigError(
                f"a shape has no option {next(iter(given))}; options: {', '.join(OWN)}"
            )
        default = "float16" if options.device.type == "cuda" else "float32"
        dtype = own["dtype"] or default
        if dtype not in [known.value for known in Dtype]:
            raise ConfigError(f"dtype={dtype} is not one of {', '.join(d.value for d in Dtype)}")
        _check_shape_fits(shape, options, Dtype(dtype).torch)
        return random_source(shape, options.ratio, longest, options.device, Dtype(dtype).torch)
    overrides = [f"{key}={value}" for key, value in given.items()]
    overrides += [f"ratio={options.ratio:g}", f"runtime.device={options.device}"]
    run = compose_run(overrides)
    compressed = compressed_model(run)
    config = compressed.model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", longest)
    if longest > context:
        raise ConfigError(
            f"prompt and new take {longest} tokens (with the warm-up), but the context of"
            f" {run.model.name} is {context}; take fewer"
        )
    ratio = options.ratio if compressed.ratio is None else round(compressed.ratio, 3)
    return copies_of(run.model.name, f"`{compressed.name}`", ratio, compressed.model)


def _check_shape_fits(shape: str, options: Options, dtype: torch.dtype) -> None:
    """Raise ConfigError if the dense model and its largest cache do not fit."""
    weights, per_token = dense_bytes(shape, dtype)
    needed = weights + max(load.batch * load.length for load in options.loads) * per_token
    if needed > (free := free_bytes(options.device)):
        raise ConfigError(
            f"{shape} and its cache take {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
            f" on {options.device}; take a smaller batch, prompt or shape"
        )


def _measured(source: Source, options: Options) -> tuple[pandas.DataFrame, DeviceLimits]:
    """Visit all variants in every round, there and back; return the medians, and the limits."""
    runs: dict[tuple[str, Workload], list[Timed]] = {}
    costs: dict[tuple[str, Workload], tuple[StepCost, StepCost]] = {}
    weights, limits = {}, None
    visits = [n for r in range(options.rounds) for n in list(VARIANTS)[:: -1 if r % 2 else 1]]
    for name in track(visits, len(visits), "generation", "variant"):
        model = source.variant(name)
        if limits is None:
            limits = measured_limits(options.device, next(model.parameters()).dtype)
        weights[name] = weight_bytes(model)
        for load in options.loads:
            prefill = call_cost(model, load.batch, load.prompt, load.prompt // 2)
            step = call_cost(model, load.batch, 1, load.prompt + load.new // 2)
            costs[name, load] = (prefill, step)
            runs.setdefault((name, load), []).append(generation(model, load, options.compiled))
        del model
        release_memory()
    assert limits is not None
    rows = [
        {"batch": load.batch, "prompt": load.prompt, "new": load.new, "model": name}
        | _figures(runs[name, load], runs[DENSE, load], load, costs[name, load], limits)
        | {"weights MiB": weights[name] / 2**20}
        for load, name in itertools.product(options.loads, VARIANTS)
    ]
    return pandas.DataFrame(rows), limits


def _figures(
    mine: Sequence[Timed],
    dense: Sequence[Timed],
    load: Workload,
    costs: tuple[StepCost, StepCost],
    limits: DeviceLimits,
) -> dict[str, float]:
    """Return speed and memory of one variant, beside the dense model's and the device's limits."""
    prefill, dense_prefill = (median(run.prefill for run in runs) for runs in (mine, dense))
    step, dense_step = (median(s for run in runs for s in run.steps) for runs in (mine, dense))
    peak, dense_peak = (max(run.peak_bytes for run in runs) for runs in (mine, dense))
    return {
        "prefill tok/s": load.batch * load.prompt / prefill,
        "prefill / dense": dense_prefill / prefill,
        "prefill / limit": limits.seconds(costs[0]) / prefill,
        "decode tok/s": load.batch / step,
        "decode / dense": dense_step / step,
        "decode / limit": limits.seconds(costs[1]) / step,
        "cache MiB": mine[0].cache_bytes / 2**20,
        "peak MiB": peak / 2**20,
        "peak / dense": peak / dense_peak,
    }


if __name__ == "__main__":
    with exit_in_one_line():
        log_to_console()
        print(benchmark(arguments(__doc__)))
