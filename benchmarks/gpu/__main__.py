"""Report speed, memory and exactness on this machine's GPU: make gpu-report

    python -m benchmarks.gpu                  # a model of 7B shape on a GPU, a tiny one on a CPU
    python -m benchmarks.gpu size=13b out=FOLDER

Needs torch, transformers and this repository, no network and no installation. Ends within eight
minutes: what fails, or has no time left, is a row that says so. Writes <out>/gpu-<card>.md and
.json after every part, and prints the tables at the end.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import transformers

from benchmarks.gpu.card import ceilings, factorizations
from benchmarks.gpu.compression import compression
from benchmarks.gpu.inference import decoding, single_layers
from benchmarks.gpu.numbers import numbers
from benchmarks.gpu.setting import SIZES, Setting, Table
from iosvd.errors import ConfigError, exit_in_one_line, one_line
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.system.json_files import write_json
from iosvd.system.versions import commit

ROOT = Path(__file__).parents[2]
OPTIONS = ("size", "out", "seconds")


def tests(setting: Setting) -> list[Table]:
    """Run the tests that need a GPU."""
    if not setting.cuda:
        return [Table("Tests", [{"tests": "no CUDA device here"}])]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
        lines = (found.stdout + found.stderr).strip().splitlines()
    except subprocess.TimeoutExpired as error:
        lines = [*str(error.stdout or "").splitlines(), "the tests took more than 150 s"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return [Table("Tests", [{"tests": line} for line in [*failed, *lines[-1:]]])]


PARTS: Mapping[str, Callable[[Setting], list[Table]]] = {
    "Tests": tests,
    "Ceilings": ceilings,
    "Compression": compression,
    "Numbers": numbers,
    "One layer": single_layers,
    "Decoding": decoding,
    "One factorisation": factorizations,
}


def report(setting: Setting) -> Iterator[list[Table]]:
    """Yield the tables of one part after another, each whatever became of the others."""
    for title, part in PARTS.items():
        print(f"{title}: {setting.left:.0f} s left", file=sys.stderr, flush=True)
        if setting.left <= 0:
            yield [Table(title, [{"skipped": "no time was left"}])]
            continue
        try:
            yield part(setting)
        except Exception as error:  # noqa: BLE001 (a part that fails is a row)
            traceback.print_exc()
            yield [Table(title, [{"failed": f"{type(error).__name__}: {one_line(error)}"}])]
        with suppress(Exception):  # After an error the card may refuse everything.
            gc.collect()
            if setting.cuda:
                torch.cuda.empty_cache()


def to_page(tables: list[Table], setting: Setting) -> str:
    """Return the report as Markdown."""
    head = (
        f"# GPU report, {setting.name}\n\ntorch {torch.__version__}, transformers"
        f" {transformers.__version__}, commit {commit()}, {time.strftime('%Y-%m-%d')}; model of"
        f" {setting.size.name} shape, random weights.\n"
    )
    return head + "".join(f"\n## {t.title}\n\n{_markdown(t.rows)}\n{t.notes}\n" for t in tables)


def _markdown(rows: list[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(arguments: list[str]) -> None:
    """Read the options, measure, write and print."""
    options = dict(line.partition("=")[::2] for line in arguments)
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ConfigError(f"unknown option {unknown[0]}; options: {', '.join(OPTIONS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = options.get("size") or ("7b" if device.type == "cuda" else "tiny")
    if size not in SIZES:
        raise ConfigError(f"size={size} is none of {', '.join(SIZES)}")
    setting = Setting(device, SIZES[size], float(options.get("seconds", Setting.seconds_at_most)))
    out = made(Path(options.get("out", "results/tables")))
    name = f"gpu-{re.sub(r'[^a-z0-9]+', '-', setting.name.lower()).strip('-')}"
    tables: list[Table] = []
    for found in report(setting):
        tables += found
        # After every part: what has been measured outlives whatever comes next.
        write_text(out / f"{name}.md", to_page(tables, setting))
        write_json(out / f"{name}.json", {"tables": [vars(table) for table in tables]})
    print(to_page(tables, setting))


if __name__ == "__main__":
    with exit_in_one_line():
        main(arguments(__doc__))
