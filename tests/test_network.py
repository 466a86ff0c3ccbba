"""The hub's data sets give what the local folders give; run with `pytest -m network`."""

from __future__ import annotations

import pytest
from conftest import shared

from iosvd.data.texts import read_documents
from iosvd.runs.config import compose_run

pytestmark = pytest.mark.network


def test_wikitext_rows_of_the_hub_are_those_of_the_raw_file() -> None:
    path = shared("data", "text", "wikitext2")
    hub = compose_run(["dataset=wikitext2"]).dataset
    local = compose_run(["dataset=wikitext2", f"dataset.path={path}"]).dataset
    assert read_documents(hub, hub.evaluation) == read_documents(local, local.evaluation)


@pytest.mark.parametrize("name", ["ptb", "c4"])
def test_the_hub_has_the_split(name: str) -> None:
    dataset = compose_run([f"dataset={name}"]).dataset
    documents = read_documents(dataset, dataset.evaluation)
    assert len(documents) == (dataset.evaluation.max_documents or 3761)  # PTB's test sentences.
