"""The cache of Hugging Face's libraries, which they also write to for local files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_PLACES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")


def unwritable_cache(error: BaseException | None) -> str | None:
    """Return cause and remedy if an error is that the cache cannot be written, else None."""
    places = [os.environ[name] for name in _PLACES if name in os.environ]
    places.append(str(Path.home() / ".cache"))
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DENIED and error.filename is not None:
            path = os.fsdecode(error.filename)
            if any(path.startswith(place) for place in places):
                return (
                    f"Hugging Face's libraries cannot write their cache ({path}:"
                    f" {error.strerror}); set HF_HOME to a folder of your own"
                )
        error = error.__cause__ or error.__context__
    return None
