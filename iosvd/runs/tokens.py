"""The token windows of a run, from the cache if possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from iosvd.cache.keys import tokens_key
from iosvd.cache.store import Key, Store, get_or_compute
from iosvd.data.image_text import image_windows
from iosvd.data.visual import VisualDataset, chosen_items
from iosvd.data.windows import calibration_windows, evaluation_windows
from iosvd.runs.fingerprints import tokens_identity
from iosvd.runs.reader import Reader
from iosvd.runs.run import Run
from iosvd.windows import Windows


def calibration_tokens(run: Run, reader: Reader, store: Store, revision: str | None) -> Windows:
    """Return the windows that calibrate.

    Args:
        run: the run.
        reader: the run's.
        store: holds them.
        revision: the hub's commit of the tokenizer.
    """
    c, text = run.data.calibration, run.data.dataset
    if isinstance(text, VisualDataset):
        items = chosen_items(text, c.windows, c.seed)
        return image_windows(reader.processor, items, text.prompt, text.counted, images=text.images)
    tokenizer = reader.tokenizer
    options = {"windows": c.windows, "length": c.seq_len, "seed": c.seed, "use": "calibration"}
    key = tokens_key(tokens_identity(run, text, text.calibration, options, revision))
    return _kept(
        store, key, lambda: calibration_windows(tokenizer, text, c.windows, c.seq_len, c.seed)
    )


def evaluation_tokens(
    run: Run, reader: Reader, store: Store, revision: str | None
) -> dict[str, Windows]:
    """Return the windows of each evaluation text."""
    found = {}
    for name, text in run.eval.texts.items():
        options: dict[str, Any] = {"windows": run.eval.windows, "length": run.eval.seq_len}
        key = tokens_key(tokens_identity(run, text, text.evaluation, options, revision))

        def compute(text: Any = text) -> Tensor:
            return evaluation_windows(reader.tokenizer, text, run.eval.seq_len, run.eval.windows)

        found[name] = _kept(store, key, compute)
    return found


def _kept(store: Store, key: Key, compute: Callable[[], Tensor]) -> Windows:
    entry, _ = get_or_compute(store, key, key, lambda: {"windows": compute()})
    return Windows(entry.tensors["windows"])
