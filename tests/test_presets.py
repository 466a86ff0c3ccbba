"""Presets by name, in a checkout and from an installed wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

import iosvd
from iosvd.errors import ConfigError
from iosvd.presets import preset, preset_names
from iosvd.runs.config import compose_run

ROOT = Path(__file__).parents[1]
INPUT_OUTPUT = ["whitening=input_output"]


# The options of zs_svd follow the ratio.
CELLS = [(name, 0.3) for name in preset_names()] + [("zs_svd", 0.4), ("zs_svd", 0.8)]


@pytest.mark.parametrize(("name", "ratio"), CELLS)
def test_a_preset_is_what_hydra_composes(name: str, ratio: float) -> None:
    run = compose_run([f"method={name}", f"ratio={ratio}"])
    assert preset(name, ratio) == run.method
    assert run.label == name


def test_a_preset_that_does_not_exist_names_its_neighbours() -> None:
    with pytest.raises(
        ConfigError, match=r"no method is called io_svd_pls; did you mean io_svd_pl"
    ):
        preset("io_svd_pls")
    assert "io_svd" in preset_names() and len(preset_names()) >= 45


HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in EXTRAS
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""
EXAMPLE = (
    HIDING
    + """
import torch
import iosvd

assert iosvd.__file__.startswith(sys.argv[1]), iosvd.__file__
try:
    iosvd.Model("tiny", dtype="float8")
except iosvd.IosvdError as error:
    print(error)
tiny = iosvd.Model("tiny", embedded=True, dtype="float32")
model = iosvd.load_model(tiny)
tokens = torch.randint(0, 500, (8, 64), generator=torch.Generator().manual_seed(0))
result = iosvd.compress(model, tokens, method="io_svd_plus", ratio=0.6)
print(result.plan.ratio_achieved, iosvd.perplexity(result.model, tokens))
try:
    iosvd.compress(model, tokens, method="svd_llm_lora", ratio=0.6)
except iosvd.IosvdError as error:
    print(error)
try:
    iosvd.compress(iosvd.load_model(tiny), tokens, method="svd_llm_lora", ratio=0.6)
except iosvd.IosvdError as error:
    print(error)
"""
)


def test_the_library_works_from_a_wheel_without_the_extras(tmp_path: Path) -> None:
    """Built from a copy of the sources, installed elsewhere, with every extra hidden."""
    source, wheels, place = tmp_path / "source", tmp_path / "wheels", tmp_path / "place"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("iosvd", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    found = subprocess.run(
        [sys.executable, "-c", f"EXTRAS = {extras()}\n{EXAMPLE}", str(place)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    dtype, measured, again, missing = found.stdout.splitlines()
    assert dtype == "dtype=float8 is not one of float16, bfloat16, float32"
    ratio, perplexity = map(float, measured.split())
    assert 0.59 < ratio <= 0.6 and perplexity > 1
    assert again == "this model is compressed already; start from the dense one"
    assert missing == (
        "peft is not installed; install iosvd with its extra: pip install 'iosvd[experiments]'"
    )


def extras() -> set[str]:
    """Return the modules that only the extra brings."""
    lines = requires("iosvd") or []
    names = {re.split(r"[<>=]", line)[0] for line in lines if "experiments" in line}
    modules = {"hydra-core": "hydra", "lm-eval": "lm_eval"}
    return {modules.get(name, name.replace("-", "_")) for name in names}


def test_a_preset_that_follows_the_ratio_needs_one() -> None:
    with pytest.raises(ConfigError, match="the options of zs_svd follow the ratio; give preset"):
        preset("zs_svd")
    composed = compose_run(["method=zs_svd", "target_kl=0.1", "whitening.top_k=0", *INPUT_OUTPUT])
    assert preset("zs_svd", target_kl=0.1).min_rank_fraction == composed.method.min_rank_fraction
    assert preset("svd") == preset("svd", 0.4)


def test_the_public_names_exist() -> None:
    assert all(getattr(iosvd, name) is not None for name in iosvd.__all__)
