"""The order of the methods on a trained model, relative to the dense model measured here.

The tests are collected by the files that import them, each with its own `bench`: one file is one
worker's, so that statistics are collected once.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from iosvd.cache.disk import Cache
from iosvd.data.texts import Dataset
from iosvd.data.windows import calibration_windows, evaluation_windows
from iosvd.evaluation.perplexity import perplexity
from iosvd.models.loading import Model, load_model, load_tokenizer
from iosvd.pipeline import compress
from iosvd.runs.config import compose_run

# Between two ratios at which every change is tested.
SLOW = pytest.param(0.6, marks=pytest.mark.slow)


@dataclass(frozen=True)
class Bench:
    """A model with its texts; statistics are collected once per seed and serve every method."""

    model: Model
    dataset: Dataset
    windows: int
    seeds: tuple[int, ...]  # Calibration seeds of the comparison at 0.4.
    length: int = 256
    evaluated: int = 100  # Windows.
    # Of what is computed once and serves every method; it goes when the bench does.
    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def __hash__(self) -> int:
        return hash(self.model.name)

    @functools.cache  # noqa: B019 (an instance lives as long as its module)
    def evaluation(self) -> torch.Tensor:
        tokenizer = load_tokenizer(self.model)
        return evaluation_windows(tokenizer, self.dataset, self.length, windows=self.evaluated)

    @functools.cache  # noqa: B019
    def dense(self) -> float:
        return perplexity(load_model(self.model), self.evaluation())

    def calibration(self, seed: int) -> torch.Tensor:
        tokenizer = load_tokenizer(self.model)
        return calibration_windows(tokenizer, self.dataset, self.windows, self.length, seed)

    @functools.cache  # noqa: B019
    def relative(self, method: str, ratio: float, seed: int = 0, *options: str) -> float:
        """Perplexity of a method, in units of the dense model's."""
        # Fewer windows for what no run here shares with another.
        fewer = {"io_svd_plus": "quantization.windows=40", "asvd": "allocation.windows=3"}
        less = [fewer[method]] if method in fewer else []
        run = compose_run([f"method={method}", *less, *options])
        result = compress(
            load_model(self.model),
            self.calibration(seed),
            ratio=ratio,
            method=run.method,
            batch_size=16,
            store=Cache(Path(self.folder.name)),
            identity=self.model.name,
        )
        return perplexity(result.model, self.evaluation()) / self.dense()


@pytest.mark.parametrize("ratio", [0.8, SLOW])
def test_each_whitening_adds_to_the_one_before(bench: Bench, ratio: float) -> None:
    assert 1 < bench.relative("io_svd", ratio) < bench.relative("svd_llm", ratio)
    assert bench.relative("svd_llm", ratio) < bench.relative("asvd_uniform", ratio)
    assert bench.relative("asvd_uniform", ratio) < 1.05 * bench.relative("svd", ratio)


def test_spectral_holds_at_040_where_the_first_order_score_does_not(bench: Bench) -> None:
    """The first-order score varies with the seed: on babyllama by half, so the mean counts."""

    def mean(method: str) -> float:
        return statistics.mean(math.log(bench.relative(method, 0.4, s)) for s in bench.seeds)

    assert mean("io_svd_spectral") < mean("io_svd") < math.log(bench.relative("svd_llm", 0.4))


@pytest.mark.parametrize("ratio", [0.8, SLOW, 0.4])
def test_int8_is_better_at_the_same_bytes_and_loss_aware_best(bench: Bench, ratio: float) -> None:
    plus, remapped = bench.relative("io_svd_plus", ratio), bench.relative("io_svd_remap", ratio)
    assert plus <= remapped <= bench.relative("io_svd", ratio)
    without_gradient = bench.relative("io_svd_spectral_plus", ratio)
    assert without_gradient <= remapped
    assert without_gradient == pytest.approx(plus, rel=0.05)


@pytest.mark.parametrize("ratio", [SLOW, 0.4])
def test_the_anchored_refit_removes_much_of_what_io_svd_loses(bench: Bench, ratio: float) -> None:
    """Of the gap in log-perplexity to the dense model; spectral ranks alone are never better."""
    refitted = math.log(bench.relative("io_svd_anchored", ratio))
    assert refitted < math.log(bench.relative("io_svd_spectral", ratio))
    assert refitted < 0.6 * math.log(bench.relative("io_svd", ratio))


SEARCHED = pytest.param("asvd", marks=pytest.mark.slow)


@pytest.mark.parametrize("method", ["svd", "svd_llm", "io_svd", "io_svd_spectral", SEARCHED])
def test_less_budget_is_never_better(bench: Bench, method: str) -> None:
    found = [bench.relative(method, ratio) for ratio in (0.8, 0.6, 0.4)]
    assert 1 < found[0] < found[1] < found[2]
