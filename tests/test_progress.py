"""Progress lines in logs, for runs without a terminal."""

from __future__ import annotations

import logging
import re
import time

import pytest

from iosvd.system import progress
from iosvd.system.logs import Where, of_run, of_stage
from iosvd.system.progress import Loop, counted, duration, heartbeat, track


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The log, with a line every 50 ms instead of every minute."""
    monkeypatch.setattr(progress, "BEAT_SECONDS", 0.05)
    found: list[str] = []
    where = Where()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            where.filter(record)
            found.append(f"{record.where}{record.getMessage()}")

    handler = Handler()
    progress.log.addHandler(handler)
    caplog.set_level(logging.INFO)
    yield found
    progress.log.removeHandler(handler)


def test_a_loop_says_how_much_is_done_and_how_long_the_rest_takes(lines: list[str]) -> None:
    with of_run("io_svd-0.6"), of_stage("statistics"):
        for _ in track(range(4), 4, "statistics", "batch"):
            time.sleep(0.12)
    assert lines[0] == "[io_svd-0.6 | statistics] statistics: 4 × batch"
    assert re.fullmatch(
        r"\[io_svd-0.6 \| statistics\] statistics: batch 2 of 4, 25% done, about 0 s left",
        next(line for line in lines if "batch 2" in line),
    )
    assert any("batch 1 of 4, 0 s so far" in line for line in lines)
    count = len(lines)
    time.sleep(0.15)
    assert len(lines) == count  # It ends with its stage.


def test_a_stage_without_items_says_that_it_is_at_work(lines: list[str]) -> None:
    with of_stage("load"):
        time.sleep(0.2)
    assert lines and set(lines) == {"[load] at work, 0 s so far"}


def test_only_the_outermost_loop_and_the_innermost_stage_speak(lines: list[str]) -> None:
    with heartbeat(), of_stage("allocation"):
        for _ in track(range(2), 2, "search", "trial"):
            for _ in track(range(3), 3, "perplexity", "batch"):
                time.sleep(0.03)
    assert lines and all(line.startswith("[allocation] search: ") for line in lines)


def test_counted_work_ends_after_an_error(lines: list[str]) -> None:
    with pytest.raises(KeyError), counted(10, "zero-shot", "answer") as loop:
        loop.advance(4)
        raise KeyError
    assert lines == ["zero-shot: 10 × answer"]
    for item in track(range(5), 5, "refit", "block"):
        if item == 1:
            break
    assert [line for line in lines if "refit" in line] == ["refit: 5 × block"]
    assert not progress._loops and not progress._stages


def test_a_loop_that_is_left_early_is_no_longer_reported(lines: list[str]) -> None:
    steps = track(range(5), 5, "refit", "block")
    next(steps)
    steps.close()
    assert not progress._loops


def test_work_goes_on_where_no_thread_is_to_be_had(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(progress.threading.Thread, "start", fails)
        with of_stage("load"):
            pass
    assert not progress._stages


def test_a_terminal_has_bars_instead(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with of_stage("statistics"):
        for _ in track(range(2), 2, "statistics", "batch"):
            time.sleep(0.1)
    assert not lines


def test_time_left_is_that_of_the_items_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop("refit", "block", 30, started=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0 + 600.0)
    assert loop.line() == "refit: block 1 of 30, 10 min so far"
    loop.advance(10)
    assert loop.line() == "refit: block 11 of 30, 33% done, about 20 min left"
    loop.advance(20)
    assert loop.line() == "refit: block 30 of 30, 100% done, about 0 s left"
    assert [duration(s) for s in (42, 600, 7200)] == ["42 s", "10 min", "2.0 h"]
