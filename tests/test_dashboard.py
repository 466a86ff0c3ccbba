"""The static page holds every complete run, and a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_execution import metrics, run, source

from experiments import dashboard as command
from iosvd.errors import RecordError
from iosvd.runs.execution import execute
from iosvd.runs.records import METRICS, PLAN, run_folder
from iosvd.tables.dashboard import read_runs, to_page

__all__ = ["source"]  # The fixture.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture
def results(source: Path) -> Path:
    for method, ratio in (("dense", 1), ("svd", 0.8), ("svd", 0.5), ("svd_llm", 0.5)):
        execute(run(source, f"method={method}", f"ratio={ratio}"))
    return source / "results"


def test_the_page_holds_what_the_records_say(results: Path, source: Path) -> None:
    runs = read_runs(results)
    assert (runs[0]["label"], runs[0]["ratio"]) == ("dense", 1.0)
    assert len(runs) == 4 and len({r["setting"] for r in runs}) == 1
    asked = run(source, "method=svd", "ratio=0.5")
    (held,) = [r for r in runs if (r["label"], r["ratio"]) == ("svd", 0.5)]
    expected = metrics(run_folder(asked))
    assert held["measures"] == {"text_ppl": expected["perplexity"]["own"]}  # type: ignore[index]
    plan = json.loads((run_folder(asked) / PLAN).read_text())
    ranks = {site["site"]: site["rank"] for site in held["ranks"]}
    assert ranks == {name: site["rank"] for name, site in plan["sites"].items()}
    for text in ("</script><script>alert(1)", "<!--<script>", "</SCRIPT >"):
        page = to_page([{**held, "setting": text}])
        data = page.partition('id="runs">')[2].partition("</script>")[0]
        assert "<" not in data and json.loads(data)[0]["setting"] == text
        assert page.count("</script>") == 2  # Nothing that a run holds ends the page's script.
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_page([{**held, "ratio": float("nan")}])


def test_another_protocol_is_another_setting(results: Path, source: Path) -> None:
    execute(run(source, "method=svd", "ratio=0.5", "dataset.join=x"))
    execute(run(source, "method=io_svd", "whitening.top_k=2", "ratio=0.5"))
    runs = read_runs(results)
    assert len(runs) == 6 and len({held["setting"] for held in runs}) == 2


def test_runs_that_cannot_be_read_are_left_out_and_named(
    results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = next((results / "runs").glob(f"*/svd_llm-*/{METRICS}"))
    damaged.write_text("{")
    assert len(read_runs(results)) == 3
    assert f"left out: {damaged.parent}" in caplog.text


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="holds no complete run; `make demo` makes some"):
        command.write(tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no chromium; apt-get install chromium")
def test_a_browser_shows_the_table_the_curves_and_the_ranks(results: Path) -> None:
    page = command.write(results)
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={results}/browser", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    shown = done.stdout
    runs = read_runs(results)
    table = re.search(r'<table id="pivot">.*?</table>', shown, re.DOTALL)
    assert table is not None
    assert re.findall(r"<th>(.*?)</th>", table[0]) == ["method", "1", "0.8", "0.5"]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table[0])
    for held in runs:
        assert f"{held['measures']['text_ppl']:,.2f}" in cells
    assert shown.count("<polyline") == 2 and shown.count("<circle") == 3 + 2
    assert shown.count("<rect") == 1 + len(runs[0]["ranks"])
