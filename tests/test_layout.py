"""Imports run one way, and every part of the house is where the README says."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import what stands on lines above its own; on one line, only its own package.
ORDER = (
    ("errors",),
    ("system", "metric", "options", "windows"),
    ("data", "models", "linalg", "grams", "budget"),
    ("statistics", "evaluation"),
    ("types",),
    ("whitening", "factorization", "scoring", "plan"),
    ("allocation", "layers"),
    ("inference", "serving"),
    ("cache",),
    ("trials", "quantization"),
    ("truncation", "target"),
    ("correction",),
    ("method",),
    ("presets",),
    ("pipeline", "figures"),
    ("runs",),
    ("sweeps",),
    ("tables",),
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}
MODULES = sorted((ROOT / "iosvd").rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file names in an import, for types alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("iosvd"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iosvd"):
            assert node.module is not None
            inner = node.module == "iosvd"
            yield from (f"iosvd.{a.name}" for a in node.names) if inner else [node.module]


def parts() -> list[Path]:
    return [p for p in MODULES if p.relative_to(ROOT / "iosvd") != Path("__init__.py")]


@pytest.mark.parametrize("path", parts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    mine = path.relative_to(ROOT / "iosvd").with_suffix("").parts[0]
    for name in imported(path):
        other = name.split(".")[1]
        below = LEVELS[other] < LEVELS[mine]
        assert below or other == mine, f"{path.name} imports {name}, which is not below it"


def test_no_module_imports_itself_round_about() -> None:
    graph = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): set(
            imported(p)
        )
        for p in parts()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join((*way, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_packages_that_are_only_a_place_import_nothing() -> None:
    places = "cache data inference layers models runs serving statistics sweeps system"
    for name in places.split():
        assert list(imported(ROOT / "iosvd" / name / "__init__.py")) == []


FACADE = {("pipeline.py", "compress"), ("pipeline.py", "factorize")}
CODE = [*MODULES, *(ROOT / "experiments").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_screen(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is long"
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given = [argument for argument in named if argument.arg not in ("self", "cls")]
            if (path.name, node.name) not in FACADE:
                assert len(given) <= 8, f"{node.name} takes {len(given)} parameters"


def test_no_variant_is_told_from_others_outside_its_package() -> None:
    """Properties in a package's base.py tell other packages about its variants."""
    variants = {
        name: package
        for package in ("whitening", "allocation", "correction", "quantization")
        for name in vars(importlib.import_module(f"iosvd.{package}")).get("__all__", ())
    }
    assert len(variants) > 25
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"):
                continue
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            for name in asked & set(variants):
                assert path.parent.name == variants[name], f"{path} asks for {name}"
