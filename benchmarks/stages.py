"""Seconds and peak memory of each stage, as ratios to one training step in the same run: make bench

    python benchmarks/stages.py model=local model.path=FOLDER model.seq_len=256
    python benchmarks/stages.py table=corrections  # one of the two tables

The reference is forward and backward of a plain training step (gradients of all weights, no
optimiser) over the same tokens in the same batches; of several repetitions the fastest counts.
The limit is arithmetic: multiplications of the statistics over those of the training step, with
attention, norms and the softmax left out of both. Prints the tables and writes them to
<results>/tables/benchmark-<model>.md and benchmark-corrections-<model>.md.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pandas
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iosvd.cache.disk import Cache
from iosvd.data.windows import calibration_windows
from iosvd.errors import ConfigError, check_at_least, exit_in_one_line
from iosvd.models.loading import load_tokenizer
from iosvd.pipeline import compress_to
from iosvd.runs.config import compose_run, own_option
from iosvd.runs.run import Run
from iosvd.runs.steps import batch_size, calibration_of, loaded
from iosvd.statistics.planning import Outline, outline
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.system.timing import Stage, StageClock
from iosvd.system.versions import commit

RELATIVE_TO = "svd_llm"
TABLES = {
    "truncations": (
        *("svd", "fwsvd", "asvd", RELATIVE_TO, "svd_llm_v2", "dip_svd", "zs_svd", "obd_llm"),
        *("gfwsvd", "kfac_svd", "kfac_lems"),
        *("io_svd", "io_svd_plus", "io_svd_spectral", "io_svd_hull", "io_svd_tuned"),
    ),
    "corrections": (
        *(RELATIVE_TO, "saes_svd", "svd_llm_lora", "zs_svd_corrected", "aa_svd_brief"),
        *("io_svd_anchored", "io_svd_distilled", "io_svd_refined_brief"),
        *("io_svd_end_to_end_brief", "io_svd_full_brief"),
    ),
}
REPETITIONS = 1  # Half an hour for the embedded model; repetitions=3 for less noise.


def train(model: PreTrainedModel, tokens: Tensor, size: int) -> None:
    """Forward and backward over the tokens, with gradients of all weights."""
    for batch in tokens.split(size):
        batch = batch.to(model.device)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad()


def measure_training(run: Run, tokens: Tensor) -> Stage:
    """Measure the reference."""
    model = loaded(run).train().requires_grad_(True)
    size = batch_size(run, tokens)
    train(model, tokens[:size], size)  # Warm-up.
    clock = StageClock()
    with clock.stage("training step"):
        train(model, tokens, size)
    return clock.stages["training step"]


def measure_method(run: Run, tokens: Tensor) -> dict[str, Stage]:
    """Measure the stages of a compression."""
    # With a store, so that a correction does not collect the statistics again.
    with tempfile.TemporaryDirectory() as folder:
        store = Cache(Path(folder))
        calibration = calibration_of(run, loaded(run), tokens, store)
        return dict(compress_to(run.goal, run.method, calibration).stages)


def arithmetic_limit(run: Run, shapes: Outline, length: int) -> float:
    """Return multiplications of the statistics over those of the training step, per token."""
    needs = run.method.whitening.needs | run.method.allocation.needs
    return shapes.statistics(needs, length).total / (3 * shapes.forward)


def benchmark(overrides: list[str]) -> None:
    """Measure, print and write the tables."""
    asked, overrides = own_option(overrides, "repetitions")
    if asked is not None and not asked.isdecimal():
        raise ConfigError(f"repetitions={asked} is no number; for instance repetitions=3")
    repetitions = REPETITIONS if asked is None else int(asked)
    check_at_least(1, repetitions=repetitions)
    only, overrides = own_option(overrides, "table")
    if only is not None and only not in TABLES:
        raise ConfigError(f"no table is called {only}; choose from: {', '.join(TABLES)}")
    for name in TABLES if only is None else [only]:
        _table(name, overrides, repetitions)


def _table(name: str, overrides: list[str], repetitions: int) -> None:
    methods = TABLES[name]
    runs = {method: compose_run([*overrides, f"method={method}"]) for method in methods}
    base = runs[RELATIVE_TO]
    data, c = base.data.text, base.data.calibration
    tokens = calibration_windows(load_tokenizer(base.model), data, c.windows, c.seq_len, c.seed)
    references: list[Stage] = []
    stages: dict[str, list[dict[str, Stage]]] = {method: [] for method in methods}
    for _ in range(repetitions):  # Interleaved, so that a busy moment affects all methods equally.
        references.append(measure_training(base, tokens))
        for method, run in runs.items():
            stages[method].append(measure_method(run, tokens))
    reference = min(references, key=lambda stage: stage.seconds)
    unit = min(_seconds(one) for one in stages[RELATIVE_TO])
    rows = [
        row(method, runs[method], stages[method], reference, unit, tokens) for method in methods
    ]
    text = report(pandas.DataFrame(rows), reference, base, tokens, repetitions)
    suffix = base.model.name if name == "truncations" else f"{name}-{base.model.name}"
    target = Path(base.runtime.output.results) / "tables" / f"benchmark-{suffix}.md"
    made(target.parent)
    write_text(target, text)
    print(text)


def row(
    method: str,
    run: Run,
    repeated: list[dict[str, Stage]],
    reference: Stage,
    unit: float,
    tokens: Tensor,
) -> dict[str, str]:
    """Return one line of the table: the fastest repetition, and the peaks of memory.

    `unit` is the seconds of the method that the others are relative to.
    """
    best = min(repeated, key=_seconds)
    total = _seconds(best)
    shapes = outline(run.model, tokens.shape[1])
    kept = sum(shapes.passes(run.method.whitening.needs | run.method.allocation.needs, math.inf))
    return {
        "method": method,
        **{
            name: f"{stage.seconds:.2f} s, {stage.peak_bytes / 2**20:.0f} MiB"
            for name, stage in best.items()
        },
        "whole, s": f"{total:.2f}",
        f"whole / {RELATIVE_TO}": f"{total / unit:.2f}",
        "whole / step": f"{total / reference.seconds:.2f}",
        "statistics / step": f"{best['statistics'].seconds / reference.seconds:.2f}",
        "its limit": f"{arithmetic_limit(run, shapes, tokens.shape[1]):.2f}",
        "correction / statistics": _ratio(best["correction"], best["statistics"]),
        "sums, MiB": f"{kept / 2**20:.1f}",
    }


def _ratio(stage: Stage, reference: Stage) -> str:
    return f"{stage.seconds / reference.seconds:.2f}" if reference.seconds > 0 else "–"


def _seconds(stages: Mapping[str, Stage]) -> float:
    return sum(stage.seconds for stage in stages.values())


def report(
    frame: pandas.DataFrame, reference: Stage, base: Run, tokens: Tensor, repetitions: int
) -> str:
    """Return the page."""
    table = frame.to_markdown(index=False, disable_numparse=True)
    windows, length = tokens.shape
    return (
        f"# benchmark, {base.model.name}\n\n{table}\n\n"
        f"Step: forward and backward of a training step over the same {windows} × {length} tokens,"
        f" {reference.seconds:.2f} s, peak {reference.peak_bytes / 2**20:.0f} MiB. Stages:"
        " seconds, and peak memory of the process. Limit: the same ratio in"
        " multiplications of the linear layers and metric sums. Fastest of"
        f" {repetitions} interleaved repetition(s), {torch.get_num_threads()} thread(s), commit"
        f" {commit()}, {time.strftime('%Y-%m-%d')}.\n"
    )


if __name__ == "__main__":
    with exit_in_one_line():
        benchmark(arguments(__doc__))
