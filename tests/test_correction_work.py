"""The planned cost of a correction, against the multiplications in a real run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from torch.utils._python_dispatch import TorchDispatchMode

from iosvd.allocation import Spectral
from iosvd.cache.disk import Cache
from iosvd.correction import (
    Anchored,
    BlockLoss,
    Correction,
    Distilled,
    EndToEnd,
    Ladder,
    Lora,
    NoCorrection,
    ProjectedGradient,
    Refinement,
    RefitOptions,
    Sequential,
)
from iosvd.correction.work import PlannedModel
from iosvd.method import Method
from iosvd.models.sites import SiteSelection
from iosvd.pipeline import compress
from iosvd.statistics.planning import outline_of
from iosvd.whitening import InputOutput

WINDOWS = torch.randint(0, 31, (20, 32), generator=torch.Generator().manual_seed(2))
SQUARED = Refinement(epochs=3, batch_windows=4)
WEIGHTED = Refinement(loss=BlockLoss.kl, epochs=3, batch_windows=4)
CORRECTIONS = {
    "anchored": Anchored(),
    "sequential": Sequential(),
    "refined": Ladder(None, SQUARED),
    "weighted": Ladder(None, WEIGHTED),
    "end to end": Ladder(end_to_end=EndToEnd(epochs=3, held_out=0.2)),
    "end to end, nothing held out": Ladder(end_to_end=EndToEnd(epochs=3, held_out=0.0)),
    "ladder": Ladder(RefitOptions(), WEIGHTED, EndToEnd(epochs=2)),
    "distilled": Distilled(epochs=2, rank=1),
    "lora": Lora(rank=1),
    "projected": ProjectedGradient(rounds=2),
}


class Counting(TorchDispatchMode):
    """Counts the multiplications of float32 products: factorisations are in float64."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.addmm_.default,
        ):
            a, b = args[-2:]
            self.total += a.dtype is torch.float32 and a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def counted(correction: Correction, windows: int) -> tuple[int, float]:
    """Return the multiplications of a whole compression, and the share of the weights it keeps."""
    method, tokens = Method(InputOutput(), Spectral(), correction), WINDOWS[:windows]
    with Counting() as mode, tempfile.TemporaryDirectory() as folder:
        found = compress(
            build("llama"),
            tokens,
            method=method,
            ratio=0.5,
            batch_size=5,
            store=Cache(Path(folder)),  # Or corrections would collect the statistics again.
            identity="llama",
        )
    return mode.total, found.plan.ratio_achieved


def more(correction: Correction) -> tuple[int, float]:
    """Return what twice the windows take more: a few tokens find out how blocks are called."""
    (few, _), (many, ratio) = counted(correction, 10), counted(correction, 20)
    return many - few, ratio


@pytest.fixture(scope="module")
def without() -> int:
    return more(NoCorrection())[0]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_multiplications_are_as_planned(name: str, without: int) -> None:
    correction = CORRECTIONS[name]
    total, ratio = more(correction)
    shapes = outline_of(build("llama"), SiteSelection(), 128)
    planned = correction.work(PlannedModel(shapes, ratio, 32))
    assert planned is not None
    # The products of adapters are not counted; of so small a model they are a tenth.
    rel = 0.1 if name in ("distilled", "lora") else 0.02
    assert planned.passes.total * WINDOWS[10:].numel() == pytest.approx(total - without, rel=rel)
