"""The origin of a record: library versions and the project's commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_CODE = ("iosvd", "conf", "experiments", "benchmarks")
_LIBRARIES = ("iosvd", "torch", "transformers", "datasets", "lm_eval", "optuna")


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def commit() -> str:
    """Return the commit of this source tree, "+dirty" if its code was changed, or "unknown"."""
    if not (_ROOT / ".git").exists():
        return "unknown"
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        # Rendered tables and documents change no result.
        changed = _git("status", "--porcelain", "--", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
