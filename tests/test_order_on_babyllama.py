"""The set-up of the paper's claims at the smallest scale at which they can be seen."""

from __future__ import annotations

import pytest
from method_order import *  # noqa: F403 (the tests themselves)
from method_order import Bench

from iosvd.data.texts import Dataset
from iosvd.models.loading import Model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(baby: Model, stories: Dataset) -> Bench:
    return Bench(baby, stories, windows=200, seeds=(0, 1, 2))


def test_io_svd_at_080_is_within_three_percent_of_dense(bench: Bench) -> None:
    assert bench.relative("io_svd", 0.8) < 1.03


@pytest.mark.parametrize("ratio", [0.8, 0.6])
def test_chosen_rows_are_better_than_as_many_random_ones(bench: Bench, ratio: float) -> None:
    random = [
        bench.relative(
            "io_svd_plus", ratio, 0, "quantization.score=random", f"quantization.seed={seed}"
        )
        for seed in range(5)
    ]
    assert bench.relative("io_svd_plus", ratio) < min(random)


def test_the_refit_must_be_anchored_to_the_dense_model(bench: Bench) -> None:
    """Refitted to their own outputs behind the prefix alone, sites drift further (METHODS 7)."""
    own = bench.relative("io_svd_anchored", 0.4, 0, "correction.trust=0", "correction.ridge=0.001")
    assert bench.relative("io_svd_anchored", 0.4) < 0.9 * own
