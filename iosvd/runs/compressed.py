"""The compressed model of a run, without its measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from iosvd.layers.folder import is_compressed
from iosvd.models.loading import folder_of, hub_revision, load_tokenizer
from iosvd.pipeline import Compressed, compress_to
from iosvd.runs.reader import Reader
from iosvd.runs.records import PLAN, read_plan
from iosvd.runs.run import Run
from iosvd.runs.steps import cache_of, calibration_of, loaded
from iosvd.runs.tokens import calibration_tokens

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CompressedModel:
    """A compressed model, loaded from its checkpoint or compressed as a run does it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    ratio: float | None  # Bits kept / bits of the dense model; None: a checkpoint without a plan.
    from_checkpoint: bool


def compressed_model(run: Run) -> CompressedModel:
    """Load the run's model if it is a compressed checkpoint, else compress it as the run does."""
    folder = folder_of(run.model)
    if folder is not None and is_compressed(folder):
        known = (folder / PLAN).is_file()
        ratio = float(read_plan(folder)["ratio_achieved"]) if known else None
        tokenizer = load_tokenizer(run.model)
        return CompressedModel(loaded(run), tokenizer, folder.resolve().name, ratio, True)
    compressed, reader = compressed_again(run)
    ratio, tokenizer = compressed.plan.ratio_achieved, reader.tokenizer
    return CompressedModel(compressed.model, tokenizer, f"{run.label} at {ratio:.3f}", ratio, False)


def compressed_again(run: Run) -> tuple[Compressed, Reader]:
    """Compress a run's model, from the cache if possible, and measure nothing."""
    cache, reader = cache_of(run), Reader.of(run)
    tokens = calibration_tokens(run, reader, cache, hub_revision(run.model))
    calibration = calibration_of(run, loaded(run), tokens, cache)
    return compress_to(run.goal, run.method, calibration), reader
