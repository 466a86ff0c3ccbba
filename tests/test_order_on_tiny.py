"""The embedded model has the redundancy of a real one: the demo's order holds on it."""

from __future__ import annotations

import math

import pytest
from method_order import *  # noqa: F403 (the tests themselves)
from method_order import Bench

from iosvd.runs.config import compose_run


@pytest.fixture(scope="module")
def bench() -> Bench:
    run = compose_run([])
    return Bench(run.model, run.data.dataset, windows=96, seeds=(0,), evaluated=50)


def test_int8_is_better_at_the_same_bytes_after_a_refit_too(bench: Bench) -> None:
    plus = bench.relative("io_svd_anchored_plus", 0.4, 0, "quantization.windows=40")
    assert plus < bench.relative("io_svd_anchored", 0.4)


def test_distillation_goes_on_where_the_refit_ends(bench: Bench) -> None:
    """On text that it has not seen: more than a tenth of what is left of the gap."""
    distilled = bench.relative("io_svd_distilled", 0.4, 0, "correction.epochs=1")
    assert math.log(distilled) < 0.9 * math.log(bench.relative("io_svd_anchored", 0.4))
