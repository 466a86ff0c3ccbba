"""From texts to token windows of exactly the requested number and length."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iosvd.data.texts import Dataset, read_documents
from iosvd.errors import ConfigError, DataError
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, windows: int, length: int, seed: int
) -> Tensor:
    """Return calibration tokens (windows, length) of the data set's calibration split.

    Spans of the joined text at random places, all different; with `document_windows` a random
    choice of `document_windows`. The same seed gives the same windows.

    Raises:
        DataError: the text is too short for them.
    """
    texts = read_documents(dataset, dataset.calibration)
    generator = torch.Generator().manual_seed(seed)
    if dataset.document_windows:
        candidates = document_windows(tokenizer, texts, length)
        _require(len(candidates), windows, length, dataset)
        return candidates[torch.randperm(len(candidates), generator=generator)[:windows]]
    tokens = _tokens(tokenizer, dataset.join.join(texts))
    places = len(tokens) - length + 1
    _require(places, windows, length, dataset)
    if len(tokens) < windows * length:
        log.warning(
            "%d windows of %d tokens overlap: %s has only %d tokens",
            windows,
            length,
            dataset.name,
            len(tokens),
        )
    starts = torch.randperm(places, generator=generator)[:windows]
    return tokens[starts[:, None] + torch.arange(length)]


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, length: int, windows: int = 0
) -> Tensor:
    """Return the evaluation split as consecutive windows (windows, length), the rest dropped.

    Args:
        windows: only the first so many; 0: all.
    """
    texts = read_documents(dataset, dataset.evaluation)
    if dataset.document_windows:
        found = document_windows(tokenizer, texts, length)
    else:
        found = _chunks(_tokens(tokenizer, dataset.join.join(texts)), length)
    _require(len(found), max(1, windows), length, dataset)
    return found[:windows] if windows else found


def document_windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> Tensor:
    """Cut each document, BOS first, into consecutive windows; a last partial one is dropped."""
    if tokenizer.bos_token_id is None:
        raise ConfigError("the tokenizer has no BOS token; set dataset.document_windows=false")
    bos = torch.tensor([tokenizer.bos_token_id])
    return torch.cat([_chunks(torch.cat([bos, _tokens(tokenizer, x)]), length) for x in texts])


def check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    """Raise DataError if a token is outside the model's vocabulary, as with a foreign tokenizer."""
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise DataError(
            f"token {int(tokens.max())} is outside the model's vocabulary of {vocabulary};"
            " the tokenizer belongs to another model"
        )


def warn_if_few(windows: Windows, widths: Mapping[str, int]) -> None:
    """Warn where the calibration set has fewer than four tokens per input channel (METHODS 2.1)."""
    site, width = max(widths.items(), key=lambda item: item[1])
    tokens = int(windows.token_counts.sum())
    if tokens < 4 * width:
        log.warning(
            "calibration gives %s tokens for inputs of width %s (%s); at least %s (4 × width) are"
            " advised, or raise whitening.damping_input",
            f"{tokens:,}",
            f"{width:,}",
            site,
            f"{4 * width:,}",
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    # verbose=False: a text longer than the context is intended.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _chunks(tokens: Tensor, length: int) -> Tensor:
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


def _require(found: int, windows: int, length: int, dataset: Dataset) -> None:
    if found < windows:
        raise DataError(
            f"dataset {dataset.name} has {max(0, found)} windows of {length} tokens,"
            f" {windows} are asked for; ask for fewer or shorter windows, or give a longer text"
        )
