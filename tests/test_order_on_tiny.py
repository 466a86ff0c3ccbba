"""The embedded model has the redundancy of a real one: the demo's order holds on it."""

from __future__ import annotations

import pytest
from method_order import *  # noqa: F403 (the tests themselves)
from method_order import Bench

from iosvd.config import compose_run


@pytest.fixture(scope="module")
def bench() -> Bench:
    run = compose_run([])
    return Bench(run.model, run.dataset, run.calibration.windows, seeds=(0,))
