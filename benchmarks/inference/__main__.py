"""Dense, low-rank and latent-cache generation side by side: make bench-inference

    python -m benchmarks.inference shape=llama2_7b ratio=0.4 batch=1,64 prompt=1024 new=1024
    python -m benchmarks.inference model=smollm2_135m method=io_svd ratio=0.4 …

`shape` is one of benchmarks/inference/variants.py, with random weights; `model` is what a run
takes, and is compressed as that run does it. batch, prompt and new may be lists. Every variant is
visited once in each of `rounds`; threads, dtype (of a shape) and compiled=true are what they say.
Writes results/tables/inference-<model>-<ratio>-<device>.md and .csv, and a figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import pandas
import torch

from benchmarks.inference.limits import DeviceLimits, measured_ceiling, step_needs
from benchmarks.inference.report import write_report
from benchmarks.inference.timing import Timed, Workload, generation
from benchmarks.inference.variants import DENSE, SHAPES, VARIANTS, Source, copies_of, random_source
from iosvd.errors import ConfigError, exit_in_one_line
from iosvd.inference.memory import weight_bytes
from iosvd.models.loading import Dtype
from iosvd.runs.config import compose_run
from iosvd.runs.measurement import compressed_again
from iosvd.runs.steps import device_for
from iosvd.system.commands import arguments
from iosvd.system.machine import release_memory
from iosvd.system.progress import track

OWN = {
    **{"batch": "1,16", "prompt": "128,1024", "new": "32", "rounds": "3", "threads": "0"},
    **{"dtype": "", "device": "auto", "compiled": "false", "shape": ""},
}


@dataclass(frozen=True)
class Options:
    """What is measured, and how often."""

    loads: Sequence[Workload]
    rounds: int
    compiled: bool
    device: torch.device


def benchmark(overrides: Sequence[str]) -> str:
    """Measure, write and return the page."""
    given = dict(line.partition("=")[::2] for line in overrides)
    own = {name: given.pop(name, default) for name, default in OWN.items()}
    options = _options(own)
    if int(own["threads"]):
        torch.set_num_threads(int(own["threads"]))
    source = _source(given, own, options)
    dtype = next(source.build().parameters()).dtype
    ceiling = measured_ceiling(options.device, dtype)
    frame = pandas.DataFrame(_rows(source, options, ceiling))
    ratio = float(given.get("ratio", "0.8"))
    return write_report(frame, source, ratio, options.device, ceiling, list(overrides))


def _options(own: dict[str, str]) -> Options:
    try:
        batches, prompts, news = (
            [int(part) for part in own[name].split(",")] for name in ("batch", "prompt", "new")
        )
        loads = [Workload(*values) for values in itertools.product(batches, prompts, news)]
        rounds = int(own["rounds"])
    except ValueError as error:
        raise ConfigError(f"batch, prompt, new and rounds are whole numbers: {error}") from None
    if min(rounds, *batches, *prompts, *news) < 1:
        raise ConfigError("batch, prompt, new and rounds are at least 1")
    device = torch.device(device_for(own["device"]))
    return Options(loads, rounds, own["compiled"] == "true", device)


def _source(given: dict[str, str], own: dict[str, str], options: Options) -> Source:
    ratio = float(given.get("ratio", "0.8"))
    if shape := own["shape"]:
        if shape not in SHAPES:
            raise ConfigError(f"shape={shape} is not one of {', '.join(SHAPES)}")
        default = "float16" if options.device.type == "cuda" else "float32"
        longest = max(load.length for load in options.loads)
        dtype = Dtype(own["dtype"] or default).torch
        return random_source(shape, ratio, longest, options.device, dtype)
    overrides = [f"{key}={value}" for key, value in given.items()]
    run = compose_run([*overrides, f"runtime.device={options.device}"])
    compressed, _ = compressed_again(run)
    context = compressed.model.config.max_position_embeddings
    for load in options.loads:
        if load.length > context:
            raise ConfigError(
                f"prompt={load.prompt} and new={load.new} are longer than the context of"
                f" {run.model.name}, {context} tokens; take fewer"
            )
    return copies_of(run.model.name, f"{run.label} at {ratio:g}", compressed.model)


def _rows(source: Source, options: Options, ceiling: DeviceLimits) -> list[dict[str, object]]:
    """Visit all variants in every round; return the medians."""
    found: dict[tuple[str, Workload], list[Timed]] = {}
    needs, weights = {}, {}
    visits = [(r, name) for r in range(options.rounds) for name in VARIANTS]
    for _, name in track(visits, len(visits), "generation", "variant"):
        model = source.variant(name)
        weights[name] = weight_bytes(model)
        for load in options.loads:
            held = load.prompt + load.new // 2
            needs[name, load] = step_needs(model, load.batch, held)
            timed = generation(model, load, options.compiled)
            found.setdefault((name, load), []).append(timed)
        del model
        release_memory()
    rows = []
    for load, name in itertools.product(options.loads, VARIANTS):
        mine, dense = found[name, load], found[DENSE, load]
        step, prefill = _step(mine), median(t.prefill for t in mine)
        peak, dense_peak = (min(t.peak_bytes for t in each) for each in (mine, dense))
        limit = ceiling.seconds(needs[name, load])
        rows.append(
            {
                "batch": load.batch,
                "prompt": load.prompt,
                "new": load.new,
                "model": name,
                "prefill tok/s": load.batch * load.prompt / prefill,
                "prefill / dense": median(t.prefill for t in dense) / prefill,
                "decode tok/s": load.batch / step,
                "decode / dense": _step(dense) / step,
                "limit tok/s": load.batch / limit,
                "share of limit": limit / step,
                "weights MiB": weights[name] / 2**20,
                "cache MiB": mine[0].cache_bytes / 2**20,
                "peak MiB": peak / 2**20,
                "peak / dense": peak / dense_peak,
            }
        )
    return rows


def _step(timed: Sequence[Timed]) -> float:
    return median(second for one in timed for second in one.steps)


if __name__ == "__main__":
    with exit_in_one_line():
        print(benchmark(arguments(__doc__)))
