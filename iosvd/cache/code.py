"""The source files that a cached value depends on: a module and everything it imports.

They are found by reading the imports, so a file that is moved or split is not forgotten.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import uuid
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT.name
# The modules that compute each kind of value.
_ENTRIES = {
    "tokens": ("iosvd.data.windows",),
    "statistics": ("iosvd.statistics.collect",),
    "spectra": ("iosvd.factorization",),  # And the whitening's module.
    "scores": ("iosvd.scoring",),
    "curvature": ("iosvd.statistics.block_curvature",),
    "blocks": ("iosvd.correction.blockwise", "iosvd.truncation"),  # And the whitening's module.
    "trainings": ("iosvd.correction.ladder", "iosvd.truncation"),  # And the whitening's module.
    "trials": ("iosvd.trials", "iosvd.factorization"),
}
_APART = ("iosvd.errors", "iosvd.system.")  # They report and store; they change no value.


@functools.cache
def code_digest(kind: str, of: type | None = None) -> str:
    """Return a hash of the source and the libraries that compute a kind of value.

    Args:
        kind: of a cached value.
        of: a class that takes part in computing it, for instance the whitening's.
    """
    total = hashlib.sha256(
        f"torch {version('torch')} transformers {version('transformers')}".encode()
    )
    own = [] if of is None or not _is_ours(of.__module__) else [of.__module__]
    for path in source_files([*_ENTRIES[kind], *own]):
        total.update(path.read_bytes())
    if of is not None and not own:
        total.update(_source_of(of))
    return total.hexdigest()[:16]


def source_files(modules: Iterable[str]) -> list[Path]:
    """Return the files of some modules of this package, and of all that they import.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or name.startswith(_APART):
            continue
        path = _file_of(name)
        if path is None:
            raise ModuleNotFoundError(f"a cached value depends on {name}, which does not exist")
        found[name] = path
        waiting += _imported(path)
    return sorted(found.values())


def _imported(path: Path) -> Iterator[str]:
    """Yield the modules of this package that a file imports when it is run."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if _file_of(name) is not None]
            yield from modules
            if len(modules) < len(inner):
                yield node.module


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == _PACKAGE


def _file_of(module: str) -> Path | None:
    place = _ROOT.joinpath(*module.split(".")[1:])
    options = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in options if path.is_file()), None)


def _source_of(of: type) -> bytes:
    """Return the source of a class outside the package; a random value if there is none."""
    try:
        return inspect.getsource(inspect.getmodule(of) or of).encode()
    except (OSError, TypeError):
        return uuid.uuid4().bytes
