"""What the README shows works, and its tree names what there is."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pandas
import pytest
import torch
from conftest import build, random_statistics
from transformers import AutoModelForCausalLM

from iosvd.factorization import Factorization
from iosvd.models.loading import ASSETS
from iosvd.runs.config import compose, to_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model, and windows that fit it."""
    model = build("llama")
    model.resize_token_embeddings(1024)
    model.save_pretrained(tmp_path / "FOLDER")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "FOLDER" / name).write_bytes((ASSETS / "tiny" / name).read_bytes())
    (tmp_path / "TEXTS").mkdir()
    (tmp_path / "TEXTS" / "train.txt").write_text("Some text that is long enough.\n" * 400)
    (example,) = [code for code in EXAMPLES if "import iosvd" in code]
    shorter = example.replace("length=2048", "length=16")
    assert shorter != example
    monkeypatch.chdir(tmp_path)
    exec(shorter, {})
    assert (tmp_path / "COMPRESSED" / "plan.json").exists()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "DENSE")
    assert dense.num_parameters() == model.num_parameters()


def test_the_tree_names_every_folder_and_what_lies_beside_them() -> None:
    for path in (ROOT / "iosvd").glob("*.py"):
        if path.name != "__init__.py":
            assert path.name in README, path
    for folder in (*(ROOT / "iosvd").iterdir(), *(ROOT / "conf").iterdir()):
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"{folder.name}/" in README, folder


def test_the_table_of_corrections_is_the_measured_one() -> None:
    """Every number of it, against the rendered tables beside it."""
    columns = [
        ("tiny", "pydoc"),
        ("babyllama-1.0M-tok361", "tinystories"),
        *(("books-6M", text) for text in ("wikitext2", "ptb", "c4")),
    ]
    rows = re.findall(r"^\| (dense|0\.\d `\w+`) \|(.*)\|$", README, flags=re.MULTILINE)
    rows = [(name, cells.split("|")) for name, cells in rows if cells.count("|") == 4]
    assert len(rows) == 18
    for model, text in columns:
        file = ROOT / "results" / "tables" / f"beyond-{model}.csv"
        measured = pandas.read_csv(file).set_index(["label", "ratio"])[f"{text}_ppl"]
        for name, cells in rows:
            ratio, _, label = name.replace("`", "").rpartition(" ")
            expected = measured[label, float(ratio or 1)]
            assert cells[columns.index((model, text))].strip() == f"{expected:.2f}", (name, model)


def test_a_whitening_is_added_by_one_file_and_one_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README shows it, with the imports that its file would have."""
    (example,) = [code for code in EXAMPLES if "class Rms" in code]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    target = re.search(r"_target_: (iosvd\.whitening\.rms\.Rms)", README)
    assert target is not None
    module = ModuleType("iosvd.whitening.rms")
    imports = "from dataclasses import dataclass\n" + "".join(
        f"from iosvd.{package} import {names}\n"
        for package, names in (
            ("statistics.needs", "Needs, SiteStatistics"),
            ("types", "Whitener"),
            ("linalg", "DiagonalRoot, IdentityRoot"),
            ("whitening", "Whitening"),
        )
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(imports + example, module.__dict__)
    composed = compose(["method=svd_llm"])
    composed.whitening = {"_target_": target[1]}
    run = to_run(composed, "rms")
    weight, statistics = random_statistics(12, 20)
    assert statistics.input_metric is not None
    spectrum = Factorization()(weight, run.whitening(statistics), "site")
    scale = statistics.input_metric.diagonal().sqrt()
    torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(weight * scale))


def test_every_section_that_is_cited_is_there() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    sections = set(re.findall(r"^#+ ([0-9.]+?)\.? ", page, flags=re.MULTILINE))
    places = ("iosvd", "experiments", "benchmarks", "conf", "tests")
    files = [p for name in places for s in ("py", "yaml") for p in (ROOT / name).rglob(f"*.{s}")]
    cited = {m for p in files for m in re.findall(r"METHODS ([0-9]+(?:\.[0-9]+)?)", p.read_text())}
    assert len(cited) >= 10 and cited <= sections
