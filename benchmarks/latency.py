"""Milliseconds of one layer, dense and of low rank, in 16 bits, int8 and four bits: make bench

    python benchmarks/latency.py [DEVICE]

Fastest of many calls, interleaved, as a ratio to the dense layer of the same dtype and batch in the
same run. The limit at batch 1 is the bytes of the weights: a layer that takes a quarter of the
dense one's cannot do better than a quarter of its time, where memory is what it waits for. Prints
the table and writes it to results/tables/latency-<device>.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from iosvd.errors import exit_in_one_line
from iosvd.layers import rows as rows_module
from iosvd.layers.four_bit import FourBitLinear, quantize_groups
from iosvd.layers.modules import LowRankLinear, RowLinear, StoredLinear
from iosvd.layers.rows import PACKED_ROWS, RowLayout, store_rows
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.system.versions import commit

WIDTH = 4096
RANK = 1024  # Half of the dense layer's entries in two factors.
BATCHES = (1, 8, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPETITIONS = 15
PLAIN = "without the packed kernel"


def filled(layer: StoredLinear) -> StoredLinear:
    """Fill a layer with random weights, in rows where it has them."""
    with torch.no_grad():
        for name, shape in layer.shapes.items():
            matrix = torch.randn(shape) / shape[1] ** 0.5
            if name not in layer.layouts:
                getattr(layer, name).copy_(matrix)
                continue
            layout, halves = layer.layouts[name], getattr(layer, name).dtype
            int8 = torch.arange(shape[0 if layout.by_output else 1]) % 2 == 0
            int8 |= layout.int8 == len(int8)
            rows, _ = store_rows(matrix, int8, halves, layout.by_output, "the layer")
            for mine, theirs in zip(layer.rows(name), rows, strict=True):
                if mine is not None and theirs is not None:
                    mine.copy_(theirs)
    return layer


def layers(
    dtype: torch.dtype, device: str, width: int, rank: int
) -> Iterator[tuple[str, nn.Module]]:
    """Yield what is compared, the reference first."""
    dense = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
    yield "dense", dense
    low_rank = partial(LowRankLinear, width, width, rank, device=device, dtype=dtype)

    def component(int8: int) -> dict[str, RowLayout]:
        mixed = int8 < rank
        return {
            n: RowLayout(int8, by_output=n == "weight", ordered=mixed) for n in ("weight", "left")
        }

    yield "low rank", filled(low_rank())
    yield "low rank, int8", filled(low_rank(layouts=component(rank)))
    half = filled(low_rank(layouts=component(rank // 2)))
    yield "low rank, half of the rows int8", half
    channel = {
        n: RowLayout(width, by_output=n == "left", ordered=False) for n in ("weight", "left")
    }
    yield "low rank, int8 by channel", filled(low_rank(layouts=channel))
    whole = {"weight": RowLayout(width, by_output=True, ordered=False)}
    eight = filled(RowLinear(width, width, device=device, dtype=dtype, layouts=whole))
    yield "dense, int8", eight
    if device == "cpu" and dtype is torch.bfloat16:
        yield f"dense, int8, {PLAIN}", eight
    four = FourBitLinear(width, width, 128, device=device, dtype=dtype)
    codes, scale = quantize_groups(torch.randn(width, width) / width**0.5, 128, "the layer")
    four.weight.copy_(codes)
    four.scale.copy_(scale)
    yield "dense, 4-bit", four


def seconds(layer: nn.Module, x: Tensor) -> float:
    """Time one call."""
    started = time.perf_counter()
    layer(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started


@torch.inference_mode()
def measure(
    dtype: torch.dtype, device: str, width: int = WIDTH, rank: int = RANK
) -> list[dict[str, str]]:
    """Return one line for each layer."""
    compared = dict(layers(dtype, device, width, rank))
    size = {
        name: sum(t.nbytes for t in layer.state_dict().values()) for name, layer in compared.items()
    }
    lines = {
        name: {
            "dtype": str(dtype).removeprefix("torch."),
            "layer": name,
            "MiB": f"{size[name] / 2**20:.1f}",
            "bytes / dense": f"{size[name] / size['dense']:.2f}",
        }
        for name in compared
    }
    for batch in BATCHES:
        x = torch.randn(batch, width, device=device, dtype=dtype)
        best = dict.fromkeys(compared, float("inf"))
        for repetition in range(REPETITIONS + 2):
            for name, layer in compared.items():
                rows_module.PACKED_ROWS = 0 if name.endswith(PLAIN) else PACKED_ROWS
                taken = seconds(layer, x)
                if repetition >= 2:  # After a warm-up.
                    best[name] = min(best[name], taken)
        for name, taken in best.items():
            ratio = taken / best["dense"]
            lines[name][f"batch {batch}"] = f"{1e3 * taken:.3f} ms, {ratio:.2f}"
    return list(lines.values())


def report(device: str) -> str:
    """Measure and return the page."""
    import pandas

    frame = pandas.DataFrame([line for dtype in DTYPES for line in measure(dtype, device)])
    table = frame.to_markdown(index=False, disable_numparse=True)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return (
        f"# latency of one layer, {WIDTH} × {WIDTH}, rank {RANK}\n\n{table}\n\n"
        "Milliseconds, and the ratio to the dense layer of the same dtype and batch; fastest of"
        f" {REPETITIONS} interleaved calls. Where a layer only waits for its weights the limit is"
        f" bytes / dense. {name}, {torch.get_num_threads()} thread(s), commit {commit()},"
        f" {time.strftime('%Y-%m-%d')}.\n"
    )


if __name__ == "__main__":
    with exit_in_one_line():
        from iosvd.runs.steps import device_for

        asked = device_for((arguments(__doc__) or ["auto"])[0])
        page = report(asked)
        target = Path("results/tables") / f"latency-{asked.partition(':')[0]}.md"
        made(target.parent)
        write_text(target, page)
        print(page)
