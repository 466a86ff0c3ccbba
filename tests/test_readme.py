"""What the README shows works, and its tree names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import build
from transformers import AutoModelForCausalLM

from iosvd.models import ASSETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model, and windows that fit it."""
    model = build("llama")
    model.resize_token_embeddings(1024)
    model.save_pretrained(tmp_path / "FOLDER")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "FOLDER" / name).write_bytes((ASSETS / "tiny" / name).read_bytes())
    (tmp_path / "TEXTS").mkdir()
    (tmp_path / "TEXTS" / "train.txt").write_text("Some text that is long enough.\n" * 400)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    shorter = example.replace("length=2048", "length=16")
    assert shorter != example
    monkeypatch.chdir(tmp_path)
    exec(shorter, {})
    assert (tmp_path / "COMPRESSED" / "plan.json").exists()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "DENSE")
    assert dense.num_parameters() == model.num_parameters()


def test_the_tree_names_every_module_and_command() -> None:
    for path in (*(ROOT / "iosvd").glob("*.py"), *(ROOT / "experiments").glob("*.py")):
        if path.name != "__init__.py":
            assert path.name in README, path
    for folder in (*(ROOT / "iosvd").iterdir(), *(ROOT / "conf").iterdir()):
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"{folder.name}/" in README, folder
