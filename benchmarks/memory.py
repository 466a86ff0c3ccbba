"""Peak memory of the statistics against the plan made before: part of make bench

    python benchmarks/memory.py runtime.memory_gib=6

A random Llama with the widths of a 1B model and four blocks, two windows of 256 tokens, the
statistics of two allocations, of which one needs the gradient of the loss. Writes
<results>/tables/memory-<device>.md.
"""

from __future__ import annotations

import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import pandas
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from iosvd.cache.spectra import passes_over
from iosvd.cache.statistics import CachedStatistics
from iosvd.errors import exit_in_one_line
from iosvd.runs.config import compose_run
from iosvd.runs.run import Run
from iosvd.runs.steps import calibration_of, device_for, loaded, plan_statistics
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.system.machine import GIB
from iosvd.system.timing import measured
from iosvd.system.versions import commit

SHAPE = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
OPTIONS = (
    *("model=local", "model.dtype=float32", "model.seq_len=256", "calibration.windows=2"),
    *("runtime.batch_tokens=512", "runtime.memory_gib=6"),
)


def benchmark(overrides: list[str]) -> str:
    """Plan, measure, write and return the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder))
        for method in ("io_svd_spectral", "io_svd"):
            more = [f"model.path={folder}", f"method={method}", *overrides]
            run = compose_run([*OPTIONS, *more])
            # In a process of its own, so that nothing else counts.
            with get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (run,)))
    results, device = Path(run.runtime.output.results), device_for(run.runtime.resources.device)
    table = pandas.DataFrame(rows).to_markdown(index=False, floatfmt=".2f")
    page = (
        f"# Memory of the statistics, {device}\n\n{table}\n\nA random Llama of 0.5 B parameters in"
        f" float32, 2 windows of 256 tokens in one batch, GiB; the peak is the"
        f" process's, the limit what the sums may take of runtime.memory_gib="
        f"{run.runtime.resources.memory_gib:g}. {torch.get_num_threads()} thread(s),"
        f" commit {commit()}, {time.strftime('%Y-%m-%d')}.\n"
    )
    write_text(made(results / "tables") / f"memory-{device}.md", page)
    return page


def measure(run: Run) -> dict[str, float | str]:
    """Return one row: planned and measured memory."""
    planned = plan_statistics(run, torch.device(device_for(run.runtime.resources.device)))
    model = loaded(run)
    windows = run.data.calibration
    tokens = torch.randint(0, SHAPE.vocab_size, (windows.windows, windows.seq_len))
    cached = CachedStatistics(calibration_of(run, model, tokens))
    peak, passes, seconds = 0, 0, 0.0
    for group in passes_over(cached, cached.calibration.sites, planned.needs):
        with measured() as took:
            cached(group, planned.needs)
        peak, passes, seconds = max(peak, took().peak_bytes), passes + 1, seconds + took().seconds
    return {
        "method": run.label,
        "weights": planned.outline.weight_bytes / GIB,
        "activations": planned.activations / GIB,
        "sums, all": sum(planned.passes) / GIB,
        "sums, largest pass": planned.largest / GIB,
        "passes planned": len(planned.passes),
        "passes": passes,
        "peak planned": planned.peak / GIB,
        "peak measured": peak / GIB,
        "measured / planned": peak / planned.peak,
        "seconds": seconds,
    }


def _write_model(folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    with exit_in_one_line():
        print(benchmark(arguments(__doc__)))
