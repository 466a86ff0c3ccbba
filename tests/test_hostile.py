"""Files that somebody else made: taken for what they are, or refused in one line."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import torch
from checkpoints import MIXED, compressed, load, logits
from hostile import TERMINAL, Change, checkpoint_changes, run_changes, sentinels, tree
from test_execution import overrides, small_source
from torch import Tensor

import iosvd
import iosvd.runs.config
import iosvd.sweeps.expansion
from experiments import compare, dashboard, draw, render, status
from iosvd.errors import IosvdError
from iosvd.runs.composition import compose
from iosvd.runs.execution import Outcome, execute
from iosvd.runs.records import run_folder
from iosvd.sweeps.expansion import sweep_jobs

NOWHERE = Path("nowhere")  # Where changes are only counted and named.
CHECKPOINTS = [str(change) for change in checkpoint_changes(NOWHERE)]
RUNS = [str(change) for change in run_changes(NOWHERE)]


def one(changes: list[Change], name: str) -> Change:
    (found,) = [change for change in changes if change.name == name]
    return found


def is_one_line(error: BaseException) -> bool:
    text = str(error)
    return 0 < len(text) <= 2000 and text.isprintable()


def test_there_are_enough_of_them() -> None:
    assert len(CHECKPOINTS) == len(set(CHECKPOINTS)) >= 60
    assert len(RUNS) == len(set(RUNS)) >= 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    result = compressed(quantization=MIXED)
    iosvd.save(result.model, folder, result.plan)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Tensor:
    return logits(load(checkpoint))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads_as_it_was_or_is_refused(
    name: str, checkpoint: Path, expected: Tensor, tmp_path: Path
) -> None:
    outside = sentinels(tmp_path / "outside")
    before, place = tree(outside), tmp_path / "model"
    shutil.copytree(checkpoint, place)
    one(list(checkpoint_changes(outside)), name).apply(place)
    try:
        found = load(place)
    except IosvdError as error:
        assert is_one_line(error), str(error)
    else:
        assert torch.equal(logits(found), expected)
    assert tree(outside) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "outside"]


SWEEP = (
    *("experiment=main", "model=local", "dataset=local", "eval=own"),
    *("method=io_svd,svd_llm", "ratio=0.6"),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the complete results of a sweep of three runs."""
    source = small_source(tmp_path_factory.mktemp("runs"))
    for job in sweep_jobs(overrides(source, *SWEEP)):
        assert execute(job.run) is Outcome.complete
    (source / "results").rename(source / "pristine")
    return source


@pytest.fixture(scope="module", autouse=True)
def composed_once() -> Iterator[None]:
    """Let Hydra compose each line of options once: it takes most of the time here."""
    composed = functools.cache(compose)
    with pytest.MonkeyPatch.context() as patch:
        for module in (iosvd.runs.config, iosvd.sweeps.expansion):
            patch.setattr(module, "compose", lambda options: composed(tuple(options)))
        yield


@pytest.fixture
def results(good: Path) -> Path:
    shutil.rmtree(good / "results", ignore_errors=True)
    return Path(shutil.copytree(good / "pristine", good / "results"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_somebody_else_stops_no_command(
    name: str,
    good: Path,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    outside = sentinels(tmp_path / "outside")
    before = tree(outside)
    sweep = overrides(good, *SWEEP)
    jobs = {job.run.label: job.run for job in sweep_jobs(sweep)}
    one(list(run_changes(outside)), name).apply(run_folder(jobs["io_svd"]))
    damaged = tree(run_folder(jobs["io_svd"]))
    lines = status.status(sweep).splitlines()
    assert lines[-1].startswith("3 runs: ") and len(lines) <= 2, lines
    render.render(sweep)
    if name.startswith(("plan", "spectra", "a site", "metrics")):  # What figures are made of.
        assert any(path.name == "main-small-ratio.png" for path in draw.draw(sweep))
    page = dashboard.write(results).read_text()
    csv = results / "tables" / "main-small.csv"
    assert compare.compare([f"reference={csv}", *sweep])
    assert tree(run_folder(jobs["io_svd"])) == damaged  # Whoever only looks changes nothing.
    printed = capsys.readouterr().out
    other = pandas.read_csv(csv).set_index("label").loc["svd_llm"]
    assert other["text_ppl"] > 1  # What can be read is there.
    assert page.count("<script") == page.count("</script>") == 2
    assert "NaN" not in page and "Infinity" not in page
    shown = printed + caplog.text + "\n".join(lines)
    assert all(line.isprintable() for line in shown.replace("\n", "")) and TERMINAL not in shown
    # A sweep that is launched again either takes the run for complete or says why it cannot.
    assert execute(jobs["io_svd"]) in (Outcome.skipped, Outcome.failed, Outcome.complete)
    assert execute(jobs["svd_llm"]) is Outcome.skipped
    assert tree(outside) == before
