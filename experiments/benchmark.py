"""Seconds and peak memory of each stage, as ratios to one training step in the same run: make bench

    python experiments/benchmark.py model=local model.path=FOLDER model.seq_len=256

The reference is forward and backward of a plain training step (gradients of all weights, no
optimiser) over the same tokens in the same batches; of several repetitions the fastest counts.
The limit is arithmetic: multiplications of the statistics over those of the training step, with
attention, norms and the softmax left out of both. Prints the table and writes it to
<results>/tables/benchmark-<model>.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pandas
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iosvd.compression import batch_size, compress_as, loaded
from iosvd.config import compose_run
from iosvd.data import calibration_windows
from iosvd.errors import ConfigError, check_at_least, exit_in_one_line
from iosvd.kl_metric import Estimator
from iosvd.models import load_tokenizer
from iosvd.run import Run
from iosvd.sites import find_sites
from iosvd.stages import Stage, StageClock
from iosvd.statistics import collect, statistics_bytes
from iosvd.types import Needs
from iosvd.versions import commit

RELATIVE_TO = "svd_llm"
METHODS = (
    *("svd", "fwsvd", "asvd", RELATIVE_TO, "svd_llm_v2", "dip_svd", "zs_svd", "obd_llm", "gfwsvd"),
    *("io_svd", "io_svd_plus", "io_svd_spectral", "io_svd_hull"),
)
REPETITIONS = 1  # Ten minutes for the embedded model; repetitions=3 for less noise.
GRAM_SHARE = 5 / 8  # Of a symmetric product's multiplications, what linalg.add_lower_gram_ takes.


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
    return dict(compress_as(run, loaded(run), tokens).stages)


def arithmetic_limit(run: Run, tokens: Tensor) -> float:
    """Return multiplications of the statistics over those of the training step, per token."""
    model, needs = loaded(run), run.whitening.needs | run.allocation.needs
    if needs == Needs():
        return 0.0
    sites = find_sites(model, run.model.sites)
    weights = sum(site.weight.numel() for site in sites.values())
    forward = weights + model.get_output_embeddings().weight.numel()
    # One window, to see which sites share a metric.
    found = list(collect(model, tokens[:1], sites, needs).values())
    metrics = [m for s in found for m in (s.input_metric, s.kl_metric, s.fisher_metric)]
    distinct = {m.data_ptr(): m.numel() for m in metrics if m is not None}
    passes = max(1, needs.kronecker_passes)
    sampled = needs.fisher_metric is not None and needs.fisher_metric.sampled
    kl = needs.kl_metric
    # One backward pass and one product a probe, or for each of the K tokens.
    probes = 0 if kl is None else kl.probes if kl.estimator is Estimator.probe else kl.top_k
    backward = probes + sampled + needs.true_loss * passes
    weighed = (needs.gradient_windows > 0) + needs.every_gradient * passes
    products: float = weights * weighed
    repeated = sum(s.kl_metric.numel() for s in found if s.kl_metric is not None)
    products += GRAM_SHARE * (sum(distinct.values()) + max(0, probes - 1) * repeated)
    if needs.kronecker_passes:  # G A Gᵀ or Gᵀ B G, once a window.
        shapes = [site.weight.shape for site in sites.values()]
        products += passes * sum(m * n * (m + n) for m, n in shapes) / tokens.shape[1]
    return (passes * forward + backward * forward + products) / (3 * forward)


def benchmark(overrides: list[str]) -> None:
    """Measure, print and write the table."""
    asked = [o.partition("=")[2] for o in overrides if o.startswith("repetitions=")]
    overrides = [o for o in overrides if not o.startswith("repetitions=")]
    if asked and not asked[-1].isdecimal():
        raise ConfigError(f"repetitions={asked[-1]} is no number; for instance repetitions=3")
    repetitions = int(asked[-1]) if asked else REPETITIONS
    check_at_least(1, repetitions=repetitions)
    runs = {method: compose_run([*overrides, f"method={method}"]) for method in METHODS}
    base = runs[METHODS[0]]
    tokens = calibration_windows(
        load_tokenizer(base.model),
        base.dataset,
        base.calibration.windows,
        base.calibration.seq_len,
        base.calibration.seed,
    )
    references: list[Stage] = []
    stages: dict[str, list[dict[str, Stage]]] = {method: [] for method in METHODS}
    for _ in range(repetitions):  # Interleaved, so that a busy moment hits all alike.
        references.append(measure_training(base, tokens))
        for method, run in runs.items():
            stages[method].append(measure_method(run, tokens))
    reference = min(references, key=lambda stage: stage.seconds)
    unit = min(_seconds(one) for one in stages[RELATIVE_TO])
    rows = [
        row(method, runs[method], stages[method], reference, unit, tokens) for method in METHODS
    ]
    text = report(pandas.DataFrame(rows), reference, base, tokens, repetitions)
    target = Path(base.runtime.results) / "tables" / f"benchmark-{base.model.name}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
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
    kept = statistics_bytes(
        find_sites(loaded(run), run.model.sites), run.whitening.needs | run.allocation.needs
    )
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
        "its limit": f"{arithmetic_limit(run, tokens):.2f}",
        "metrics at most, MiB": f"{kept / 2**20:.1f}",
    }


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
        benchmark(sys.argv[1:])
