"""A dozen kinds of architecture: compressed, corrected, saved, and loaded by another process."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.architectures import METHODS, Tried, page, try_all

# Of each kind of block: plain, transposed weights, other names of the list, parallel, two kinds of
# experts, latent attention, state space, hybrid, convolutions, per-layer embeddings, a router.
KINDS = (
    *("gemma2", "gpt2", "bloom", "falcon", "gptj", "mixtral", "gpt_oss", "deepseek_v3"),
    *("mamba2", "falcon_h1", "lfm2", "gemma4_text", "phimoe"),
)
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
    tried = found[kind]
    assert tried.passed, (tried.refused, tried.failed)
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
