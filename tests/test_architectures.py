"""A dozen kinds of architecture: compressed, corrected, saved, and loaded by another process."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.architectures import METHODS, Tried, page, try_all

# Transposed weights, parallel branches, experts, latent attention, state space, layer embeddings.
KINDS = ("gpt2", "falcon", "mixtral", "deepseek_v3", "mamba2", "gemma4_text")
# Plain blocks, other names of the list, experts in one tensor, hybrid, convolutions, a router.
MORE = ("gemma2", "bloom", "gptj", "gpt_oss", "falcon_h1", "lfm2", "phimoe")
REFUSED = {
    "bert": "no site matches",  # Its list of blocks has a name of its own.
    "zamba": "shares its weight with",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tried]:
    folder = tmp_path_factory.mktemp("architectures")
    return {tried.kind: tried for tried in try_all((*KINDS, *REFUSED), folder)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes(found: dict[str, Tried], kind: str) -> None:
    check_passed(found[kind])


@pytest.mark.slow
def test_more_pass(tmp_path: Path) -> None:
    found = try_all(MORE, tmp_path)
    assert [tried.kind for tried in found] == list(MORE)
    for tried in found:
        check_passed(tried)


def check_passed(tried: Tried) -> None:
    assert tried.passed, (tried.kind, tried.refused, tried.failed)
    assert len(tried.methods) == len(METHODS)
    assert tried.covered > 0.6


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_one_line(found: dict[str, Tried], kind: str) -> None:
    assert REFUSED[kind] in found[kind].refused and "\n" not in found[kind].refused
    assert not found[kind].passed and not found[kind].failed


def test_the_page_counts_those_that_pass() -> None:
    """And docs/architectures.md has at least 75, and no failure that is no refusal."""
    passed = Tried("one", 4, 1.0, list(METHODS))
    lines = page([passed, Tried("two", refused="a | line")])
    assert "1 architectures pass, of 2 whose" in lines and "| two | a · line |" in lines
    written = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [line for line in written.splitlines() if line.endswith("|")]
    split = next(i for i, line in enumerate(rows) if line.startswith("| refused"))
    assert split - 2 >= 75
    assert f"{split - 2} architectures pass" in written
    assert not [row for row in rows[split:] if "Error:" in row]
