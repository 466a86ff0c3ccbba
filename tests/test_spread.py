"""Rows that are means over runs: which runs, what mean, what spread, how alike their ranks."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tables import RECORD

from iosvd.metric import other, perplexity_on
from iosvd.runs.config import compose_run
from iosvd.runs.records import run_folder
from iosvd.tables.markdown import to_markdown
from iosvd.tables.published import read_published
from iosvd.tables.spec import RowSpec, TableSpec
from iosvd.tables.spread import merged_over, without_option
from iosvd.tables.table import Found, build_table

PPL = perplexity_on("pydoc")


@pytest.mark.parametrize(
    ("label", "rest"),
    [
        ("io_svd[calibration.seed=1]", "io_svd"),
        ("io_svd[calibration.seed=1,calibration.windows=8]", "io_svd[calibration.windows=8]"),
        ("a[b=[1,2],calibration.seed=1]", "a[b=[1,2]]"),
        ("a[calibration.seed=1,w.roles=[mlp.*]]", "a[w.roles=[mlp.*]]"),
        ("io_svd", "io_svd"),
    ],
)
def test_an_option_is_taken_out_of_a_label(label: str, rest: str) -> None:
    assert without_option("calibration.seed", label) == rest


def seeds(tmp_path: Path, method: str, perplexities: list[float | None]) -> list[Found]:
    found = []
    for seed, value in enumerate(perplexities):
        results = f"runtime.results={tmp_path}"
        run = compose_run([f"method={method}", f"calibration.seed={seed}", results])
        run = replace(run, label=f"{method}[calibration.seed={seed}]")
        record = None
        if value is not None:
            record = replace(RECORD, values={PPL: value, other("pydoc_kl"): value / 100})
        found.append(Found(run, record))
    return found


def write_plan(found: Found, ranks: list[int]) -> None:
    site: dict[str, Any] = {"out_features": 8, "in_features": 8, "dense": False, "rows": 0}
    numbers = ("rounded_rows", "rounding_loss", "dropped_energy", "loss_change")
    rest = dict.fromkeys([*numbers, "damping_output", "damping_input"], 0) | {"added_bias": False}
    sites = {
        f"layers.{i}.a": site | rest | {"rank": rank, "bits": 256 * rank}
        for i, rank in enumerate(ranks)
    }
    folder = run_folder(found.run)
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"sites": sites}))


def test_a_row_is_the_mean_and_the_standard_deviation(tmp_path: Path) -> None:
    found = seeds(tmp_path, "io_svd", [20.0, 22.0, 27.0]) + seeds(tmp_path, "svd", [30.0, None])
    merged = merged_over("calibration.seed", found)
    assert [one.run.label for one in merged] == ["io_svd", "svd"]
    first, second = (one.record for one in merged)
    assert first is not None and second is not None
    assert first.value(PPL) == 23.0
    assert first.spread[PPL] == pytest.approx(statistics.stdev([20, 22, 27]))
    assert first.value(other("pydoc_kl")) == pytest.approx(0.23)
    assert (second.value(PPL), second.spread) == (30.0, {})  # One run has no spread.
    spec = TableSpec("Seeds", rows=[RowSpec("IO-SVD", "io_svd")], extra=["kl"])
    text = to_markdown(build_table(spec, merged, read_published()), [])
    assert "23.00 ± 3.61" in text and "0.2300 ± 0.0361" in text


def test_rank_agreement_is_the_correlation_of_what_sites_keep(tmp_path: Path) -> None:
    found = seeds(tmp_path, "io_svd", [20.0, 22.0, 27.0])
    for one, ranks in zip(found, ([1, 2, 3, 4], [2, 3, 4, 5], [4, 3, 2, 1]), strict=True):
        write_plan(one, ranks)
    (merged,) = merged_over("calibration.seed", found)
    assert merged.record is not None
    # Two agree wholly, each of them is the reverse of the third.
    assert merged.record.value(other("rank_agreement")) == pytest.approx((1 - 1 - 1) / 3)


def test_equal_ranks_everywhere_have_no_agreement(tmp_path: Path) -> None:
    found = seeds(tmp_path, "svd", [20.0, 22.0])
    for one in found:
        write_plan(one, [3, 3, 3])
    (merged,) = merged_over("calibration.seed", found)
    assert merged.record is not None and merged.record.value(other("rank_agreement")) is None
