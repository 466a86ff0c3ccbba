"""What produced a record: library versions and the project's commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("iosvd", "torch", "transformers", "datasets", "lm_eval")


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def commit() -> str:
    """Return the commit of this source tree, "+dirty" if it was changed, or "unknown"."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return "unknown"
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+dirty"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
