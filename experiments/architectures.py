"""Try every architecture of transformers and write docs/architectures.md: make architectures

    python -m experiments.architectures             # all: about ten minutes on one core
    python -m experiments.architectures llama gpt2  # some, without writing the page

A small random model of each is compressed to 0.6 by svd_llm, io_svd and a correction, and saved.
Another process loads every checkpoint; logits and generated tokens must be equal to the bit.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as their_logging

import iosvd
from experiments.small_models import EXCLUDED, KINDS, VOCABULARY, small_model
from iosvd.errors import IosvdError, exit_in_one_line, one_line
from iosvd.models.sites import SiteSelection, covered_share, find_sites
from iosvd.system.commands import arguments
from iosvd.system.files import write_text
from iosvd.system.json_files import read_json, typed, write_json
from iosvd.system.progress import track

METHODS = ("svd_llm", "io_svd", "io_svd_anchored")
INSTEAD = "zs_svd_corrected"  # Where hidden states cannot be carried from block to block.
PAGE = Path("docs") / "architectures.md"
_RELOAD = "--reload"
_ANSWERS, _TRIED = "answers.safetensors", "tried.json"


@dataclass(frozen=True)
class Tried:
    """The outcome of trying one architecture."""

    kind: str
    sites: int = 0
    covered: float = 0.0  # Share of the blocks' weights that the sites hold.
    methods: list[str] = field(default_factory=list)  # That were saved, and loaded back equal.
    generates: bool = True  # Whether transformers generates with the dense model.
    refused: str = ""  # The line, if it was refused.
    failed: str = ""  # Anything else that went wrong.

    @property
    def passed(self) -> bool:
        return len(self.methods) == len(METHODS) and not self.failed


def tokens() -> Tensor:
    """Return calibration windows (24, 32)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY - 12, (24, 32), generator=generator)


def answers(model: PreTrainedModel, generates: bool) -> dict[str, Tensor]:
    """Return logits of two windows, and eight greedy tokens."""
    windows = tokens()
    with torch.no_grad():
        found = {"logits": model(input_ids=windows[:2], use_cache=False).logits.contiguous()}
        if generates:
            found["generated"] = _generated(model, windows)
    return found


def _generated(model: PreTrainedModel, windows: Tensor) -> Tensor:
    mask = torch.ones_like(windows[:1, :8])
    generate: Any = model.generate
    found: Tensor = generate(
        windows[:1, :8], attention_mask=mask, max_new_tokens=8, do_sample=False
    )
    return found


def attempt(kind: str, folder: Path) -> Tried | None:
    """Compress an architecture by every method and save the checkpoints; None if it has no model.

    Args:
        kind: of the architecture.
        folder: where the checkpoints go, each with the answers that it is to give.
    """
    try:
        dense = small_model(kind)
        with torch.no_grad():
            dense(input_ids=tokens()[:2], use_cache=False)
    except Exception as error:  # noqa: BLE001 (no model to try: transformers' own errors)
        logging.getLogger(__name__).info("%s: %s", kind, one_line(error)[:200])
        return None
    tried = Tried(kind, generates=_generates(dense))
    for method in METHODS:
        tried = _compressed(tried, method, folder)
        if tried.refused or tried.failed:
            break
    return tried


def _compressed(tried: Tried, method: str, folder: Path) -> Tried:
    model = small_model(tried.kind)
    selection = SiteSelection(exclude=_excluded(tried.kind))
    try:
        sites = find_sites(model, selection)
        tried = replace(tried, sites=len(sites), covered=covered_share(model, sites))
        iosvd.compress(model, tokens(), method=method, ratio=0.6, selection=selection)
        place = folder / f"{tried.kind}-{method}"
        iosvd.save(model, place)
        save_file(answers(model, tried.generates), place / _ANSWERS)
    except IosvdError as error:
        if method == METHODS[-1]:
            return _compressed(tried, INSTEAD, folder)
        return replace(tried, refused=str(error))
    except Exception as error:  # noqa: BLE001 (the point of trying)
        return replace(tried, failed=f"{method}: {type(error).__name__}: {one_line(error)[:200]}")
    return replace(tried, methods=[*tried.methods, method])


def _excluded(kind: str) -> list[str]:
    return [EXCLUDED[kind]] if kind in EXCLUDED else []


def _generates(model: PreTrainedModel) -> bool:
    try:
        _generated(model, tokens())
    except Exception:  # noqa: BLE001 (transformers' own errors, of the dense model)
        return False
    return True


def reload(folder: Path) -> None:
    """Load all checkpoints of a folder, and record which do not answer as they were saved to."""
    from transformers import AutoModelForCausalLM

    found = []
    for tried in _read(folder):
        for method in tried.methods:
            place = folder / f"{tried.kind}-{method}"
            try:
                model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
                given, wanted = answers(model, tried.generates), load_file(place / _ANSWERS)
                if any(not torch.equal(given[name], wanted[name]) for name in wanted):
                    raise ValueError("other answers than those of the saved model")
            except Exception as error:  # noqa: BLE001 (the point of trying)
                line = f"{method} reloaded: {type(error).__name__}: {one_line(error)[:200]}"
                tried = replace(tried, failed=line)
        found.append(tried)
    _write(folder, found)


def try_all(kinds: Iterable[str], folder: Path) -> list[Tried]:
    """Try some architectures, and load their checkpoints in another process."""
    kinds = list(kinds)
    done = [attempt(kind, folder) for kind in track(kinds, len(kinds), "architectures", "kind")]
    _write(folder, [tried for tried in done if tried is not None])
    command = [sys.executable, "-m", "experiments.architectures", _RELOAD, str(folder)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    return _read(folder)


def _write(folder: Path, found: Iterable[Tried]) -> None:
    write_json(folder / _TRIED, {tried.kind: asdict(tried) for tried in found})


def _read(folder: Path) -> list[Tried]:
    return [typed(Tried, values, _TRIED) for values in read_json(folder / _TRIED).values()]


def page(found: Sequence[Tried]) -> str:
    """Return docs/architectures.md."""
    passed = [tried for tried in found if tried.passed]
    lines = [
        "# Architectures",
        "",
        f"{len(passed)} architectures pass, of {len(found)} whose small models run in this version"
        " of transformers; the others are refused with a one-line error, listed at the end. `make"
        " architectures` writes this page. It compresses a small random model of each to a ratio"
        f" of 0.6 by `svd_llm`, `io_svd` and `io_svd_anchored` (`{INSTEAD}` where blocks pass more"
        " than hidden states to each other) and saves it. To pass, another process must load the"
        " checkpoints and get bit-identical logits and generated tokens.",
        "",
        "| architecture | sites | of the blocks' weights | correction | `model.sites.exclude` |",
        "|---|--:|--:|---|---|",
    ]
    for tried in passed:
        excluded = ", ".join(f"`{glob}`" for glob in _excluded(tried.kind))
        lines.append(
            f"| {tried.kind}{'' if tried.generates else ' ¹'} | {tried.sites} |"
            f" {tried.covered:.0%} | `{tried.methods[-1]}` | {excluded} |"
        )
    lines += ["", "¹ transformers does not generate with the dense model either.", ""]
    lines += ["| refused | with |", "|---|---|"]
    for tried in found:
        if not tried.passed:
            lines.append(f"| {tried.kind} | {(tried.failed or tried.refused).replace('|', '·')} |")
    return "\n".join(lines) + "\n"


def main(given: Sequence[str]) -> None:
    """Try the named architectures, or all and write the page."""
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("iosvd").setLevel(logging.ERROR)  # Random models give many warnings.
    if given[:1] == [_RELOAD]:
        reload(Path(given[1]))
        return
    with tempfile.TemporaryDirectory(prefix="iosvd-") as folder:
        found = try_all(given or KINDS, Path(folder))
    if not given:
        write_text(PAGE, page(found))
    sys.stdout.write(page(found))


if __name__ == "__main__":
    with exit_in_one_line():
        main(arguments(__doc__))
