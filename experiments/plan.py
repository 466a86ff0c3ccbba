"""Predict memory, passes and time of a run before anything is loaded: make plan MODEL=…

    python experiments/plan.py model=llama2_7b runtime.memory_gib=24
    python experiments/plan.py model=llama2_7b card=h100      # or a100, rtx4090, rtx3090

Bytes and passes are counted from the shapes in the model's configuration. Seconds are estimated
from a short measurement on the device that the run would have: products in the model's dtype and in
float32, and the factorisation of one small matrix. For a named card they are those of the counted
products at its published peaks, so no run is faster. Attention and input/output are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from iosvd.correction.work import CorrectionWork, PlannedModel
from iosvd.errors import ConfigError, exit_in_one_line
from iosvd.factorization import Factorization
from iosvd.linalg import CholeskyRoot
from iosvd.runs.config import compose_run, own_option
from iosvd.runs.run import Run
from iosvd.runs.steps import Planned, device_for, plan_statistics
from iosvd.statistics.memory import SPARE
from iosvd.statistics.planning import Outline
from iosvd.system.commands import arguments
from iosvd.system.machine import GIB, free_bytes
from iosvd.types import Whitener

_SIZE = 512  # Of the measured matrices.
_SECONDS = 0.3  # Of each measurement.


@dataclass(frozen=True)
class Speed:
    """Multiplications per second of a device."""

    model: float  # Of a product in the model's dtype.
    sums: float  # In float32, or in TF32 where that is exact.
    factorization: float  # Counted as `factorization_work` counts.


@dataclass(frozen=True)
class Card:
    """Published peaks of a GPU: dense products in TFLOP/s, and memory."""

    half: float  # bf16 and fp16 with float32 sums.
    tf32: float  # The sums of a model in half precision.
    single: float  # float32, without TF32.
    double: float
    memory_gib: float

    def speed(self, dtype: torch.dtype, precision: torch.dtype) -> Speed:
        """Return the peaks as multiplications per second; two operations are one of them."""
        model, sums = (
            (self.single, self.single) if dtype is torch.float32 else (self.half, self.tf32)
        )
        factorization = self.double if precision is torch.float64 else self.single
        return Speed(model * 5e11, sums * 5e11, factorization * 5e11)


# NVIDIA's data sheets; half of the figures with sparsity.
CARDS = {
    "a100": Card(312, 156, 19.5, 19.5, 80),
    "h100": Card(989, 494, 67, 67, 80),
    "rtx4090": Card(165, 82.6, 82.6, 1.29, 24),
    "rtx3090": Card(71, 35.6, 35.6, 0.556, 24),
}


def plan(overrides: list[str]) -> str:
    """Return the plan of one run.

    Raises:
        ConfigError: the named card is not known.
    """
    name, overrides = own_option(overrides, "card")
    run = compose_run(overrides)
    device = torch.device("cuda" if name else device_for(run.runtime.resources.device))
    if name is None:
        speed, place, free = measure_speed(run, device), str(device), free_line(device)
    else:
        if name not in CARDS:
            raise ConfigError(f"card={name} is none of {', '.join(CARDS)}")
        card = CARDS[name]
        precision = run.method.factorization.precision.dtype
        speed = card.speed(run.model.dtype.torch, precision)
        place, free = name, f"{card.memory_gib:g} GiB"
        run = _with_memory(run, card)
    planned = plan_statistics(run, device)
    about = "about" if name is None else "at least"
    rows = [*_memory(run, planned, device, place, free), *_times(run, planned, speed, about)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if planned.largest > planned.limit:
        lines.append(
            "the sums of one site exceed what is left; raise runtime.memory_gib, lower"
            " runtime.batch_tokens, or set runtime.metrics_on_cpu=true"
        )
    return "\n".join(lines)


def _memory(
    run: Run, planned: Planned, device: torch.device, place: str, free: str
) -> list[tuple[str, str]]:
    """Return the lines about bytes and passes."""
    shapes, passes = planned.outline, planned.passes
    held = place if planned.where == device else planned.where
    batch, limit = shapes.activations.tokens, planned.limit
    return [
        ("model", f"{run.model.name}, {len(shapes.sites)} sites, {run.label}, on {place}"),
        ("weights", _gib(shapes.weight_bytes)),
        (
            "what a ratio refers to",
            f"{shapes.covered_share:.1%} of the weights of the decoder blocks",
        ),
        ("activations of a batch", f"{_gib(planned.activations)} for {batch:,} tokens"),
        ("sums of the statistics", f"{_gib(sum(passes))} in all, on {held}"),
        ("sums of the largest pass", _gib(planned.largest)),
        ("passes over the calibration set", f"{len(passes)}, sums within {_gib(limit)}"),
        (
            f"peak memory of the statistics on {place}",
            f"{_gib(planned.peak)} ({free})",
        ),
        ("cache", f"{_gib(sum(passes))} of statistics, {_gib(shapes.spectra_bytes)} of spectra"),
    ]


def _times(run: Run, planned: Planned, speed: Speed, about: str) -> list[tuple[str, str]]:
    """Return the lines about seconds."""
    shapes, length = planned.outline, run.data.calibration.seq_len
    tokens = run.data.calibration.windows * length
    work = shapes.statistics(planned.needs, length)
    model, sums = work.model * tokens / speed.model, work.sums * tokens / speed.sums
    repeated = max(1, len(planned.passes))  # Every pass repeats what goes through the model.
    factorization = factorization_work(shapes) / speed.factorization
    # Rounding plans its ranks by rules of its own; no more is kept than everything.
    kept = 1.0 if run.goal.ratio is None or run.method.quantization.rounds else run.goal.ratio
    corrected = run.method.correction.work(PlannedModel(shapes, kept, length))
    evaluation = 100 * run.eval.seq_len * shapes.forward / speed.model
    return [
        ("statistics", f"{about} {_time(repeated * model + sums)} for {tokens:,} tokens"),
        ("factorization", f"{about} {_time(factorization)}"),
        *_correction(corrected, speed, tokens, factorization, about),
        ("evaluation", f"{about} {_time(evaluation)} for 100 windows of {run.eval.seq_len}"),
    ]


def _correction(
    work: CorrectionWork | None, speed: Speed, tokens: int, factorization: float, about: str
) -> list[tuple[str, str]]:
    """Return the line of a correction; `factorization` is the seconds of one of every site."""
    if work is None:
        return [("correction", "not counted")]
    seconds = tokens * (work.passes.model / speed.model + work.passes.sums / speed.sums)
    seconds += work.factorizations * factorization
    if seconds == 0:
        return []
    trained = f", {_gib(work.training_bytes)} for what is trained" if work.training_bytes else ""
    return [("correction", f"{about} {_time(seconds)}{trained}")]


def _with_memory(run: Run, card: Card) -> Run:
    """Let a run have the memory of a card, less what allocators and libraries take."""
    resources = run.runtime.resources
    if resources.memory_gib is not None or resources.metrics_on_cpu:
        return run
    resources = replace(resources, memory_gib=(1 - SPARE) * card.memory_gib)
    return replace(run, runtime=replace(run.runtime, resources=resources))


def factorization_work(shapes: Outline) -> float:
    """Return the work of the factorisations: roots, products, eigenvalues of the smaller side."""
    return sum(_work(shape.m, shape.n) for shape in shapes.sites.values())


def _work(m: int, n: int) -> float:
    # Both roots and their solves, three products, and about nine of the smaller side's cube.
    return m**3 + n**3 + 3 * m * n * min(m, n) + 9 * min(m, n) ** 3


def measure_speed(run: Run, device: torch.device) -> Speed:
    """Measure a device for about a second."""
    few = min(run.runtime.resources.batch_tokens, 4 * _SIZE)
    a = torch.rand(few, 2 * _SIZE, device=device, dtype=run.model.dtype.torch)
    b = torch.rand(2 * _SIZE, 2 * _SIZE, device=device, dtype=run.model.dtype.torch)
    rows = torch.rand(few, 2 * _SIZE, device=device)
    double = torch.rand(_SIZE, _SIZE, device=device, dtype=torch.float64)
    lower = torch.linalg.cholesky(double @ double.T + torch.eye(_SIZE, device=device))
    once = Factorization(run.method.factorization.algorithm, run.method.factorization.precision)
    root = CholeskyRoot(lower.to(run.method.factorization.precision.dtype), 0.0)
    return Speed(
        model=few * 4 * _SIZE**2 / _seconds(lambda: a @ b, device),
        sums=few * 4 * _SIZE**2 / _seconds(lambda: rows.T @ rows, device),
        factorization=_work(_SIZE, _SIZE)
        / _seconds(lambda: once(double, Whitener(root, root), "a measurement"), device),
    )


def _seconds(compute: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the mean over several after a first one."""
    compute()
    count, started = 0, time.monotonic()
    while count == 0 or time.monotonic() - started < _SECONDS:
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return (time.monotonic() - started) / count


def free_line(device: torch.device) -> str:
    """Return the free memory of a device, as text."""
    return f"{_gib(free_bytes(device))} are free"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


if __name__ == "__main__":
    with exit_in_one_line():
        print(plan(arguments(__doc__)))
