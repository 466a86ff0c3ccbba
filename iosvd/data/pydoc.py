"""The text that comes with Python: the standard library's documentation topics and docstrings.

Real English for a first run without a network. Modules, not sentences, are divided between the
splits, so nothing of a test module was seen in training. The text differs a little from one
Python version to the next; a module stays in its split.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Their strings are fixtures and code, not documentation.
_EXCLUDED_MODULES = frozenset({"test", "this", "antigravity"})
_EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages"})


def split_of(module: str) -> str:
    """Name the split of a top-level module: 88 % of the text train, 3 % validation, 9 % test."""
    if module == "pydoc_data":
        return "train"  # The topics quote one another and are a quarter of the text.
    # datetime moved to _pydatetime in 3.12, and _pyio repeats io: the same text, the same split.
    stem = module.removeprefix("_py").lstrip("_")
    bucket = hashlib.sha256(stem.encode()).digest()[0] % 20
    return {0: "validation", 2: "test"}.get(bucket, "train")


@functools.cache
def pydoc_documents(split: str) -> tuple[str, ...]:
    """Return the documents of one split ("train", "validation" or "test"), one per source file.

    The sources are parsed, never imported. The topics come first in the train split.
    """
    documents = []
    if split == split_of("pydoc_data"):
        from pydoc_data.topics import topics

        documents += [topics[name].strip() for name in sorted(topics)]
    modules = sys.stdlib_module_names - _EXCLUDED_MODULES
    for module in sorted(name for name in modules if split_of(name) == split):
        documents += [text for path in _sources(module) if (text := _docstrings(path))]
    return tuple(documents)


def _sources(module: str) -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    if (library / f"{module}.py").is_file():
        return [library / f"{module}.py"]
    files = sorted((library / module).rglob("*.py"))
    return [p for p in files if not _EXCLUDED_FOLDERS & set(p.relative_to(library).parts)]


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # Templates that are no Python, as in lib2to3.
        return ""
    return "\n\n".join(_walk(tree))


def _walk(node: ast.AST) -> Iterator[str]:
    """Yield docstrings in the order of the source, which `ast.walk` does not keep."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)
