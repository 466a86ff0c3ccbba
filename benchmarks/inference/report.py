"""The page, the numbers and the figure of a measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pandas
import torch
import transformers

from benchmarks.inference.limits import DeviceLimits
from benchmarks.inference.variants import Source
from iosvd import figures
from iosvd.system.files import made, write_text, written_whole
from iosvd.system.machine import device_name
from iosvd.system.versions import commit

RESULTS = Path("results")
PUBLISHED = RESULTS / "paper" / "figure4.csv"


def write_report(
    frame: pandas.DataFrame,
    source: Source,
    device: torch.device,
    limits: DeviceLimits,
    overrides: Sequence[str],
) -> str:
    """Write table, numbers and figure; return the page."""
    name = f"inference-{source.name}-{source.ratio:g}-{device.type}"
    tables, drawings = made(RESULTS / "tables"), made(RESULTS / "figures")
    write_text(tables / f"{name}.csv", frame.to_csv(index=False))
    published = pandas.read_csv(PUBLISHED)
    with written_whole(drawings / f"{name}.png") as partial:
        drawn = figures.throughput(frame, published)
        drawn.savefig(partial, dpi=120, format="png", metadata={"Software": None})
    shown = frame.copy()
    for column in shown.columns:
        digits = 2 if "/" in column and "tok" not in column else 1
        if shown[column].dtype == float:
            shown[column] = shown[column].map(lambda value, d=digits: f"{value:.{d}f}")
    table = shown.to_markdown(index=False, disable_numparse=True)
    page = (
        f"# Generation, {source.name} at {source.ratio:g}\n\n{table}\n\n"
        f"{source.about}. Medians of all rounds: prefill after a warm-up, steps after two; a static"
        " cache; every variant once in a round. / dense: times the dense model's tokens per second,"
        " or its peak memory. / limit: share of what the device allows, the larger of the bytes"
        f" (weights and cache) over {limits.bytes_per_second / 1e9:.1f} GB/s and the operations"
        f" over {limits.operations_per_second / 1e9:.0f} G/s, both measured here with a large"
        " matrix-vector and a large matrix product. Peak: weights and the growth of memory during"
        " the generation, the largest of all rounds.\n\n"
        f"{device_name(device)}, {torch.get_num_threads()} thread(s), torch {torch.__version__},"
        f" transformers {transformers.__version__};"
        f" `python -m benchmarks.inference {' '.join(overrides)}`;"
        f" commit {commit()}, {time.strftime('%Y-%m-%d')}.\n"
    )
    write_text(tables / f"{name}.md", page)
    return page
