"""The size of the report's model, the device it runs on, and how time is measured there."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from iosvd.cache.store import Entry, Key, NoStore
from iosvd.errors import one_line


@dataclass(frozen=True)
class Size:
    """A Llama of which some blocks are measured; its shape is a known model's."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    blocks: int  # That are measured.
    whole: int  # Blocks of the known model.
    vocabulary: int
    length: int  # Tokens of a window.
    windows: int  # That are measured; the protocol has 256.
    ratio: float = 0.4


SIZES = {
    "tiny": Size("tiny", 64, 172, 4, 2, 2, 2, 500, 32, 8),
    "7b": Size("7b", 4096, 11008, 32, 32, 4, 32, 32000, 2048, 16),
    "13b": Size("13b", 5120, 13824, 40, 40, 3, 40, 32000, 2048, 16),
    "70b": Size("70b", 8192, 28672, 64, 8, 1, 80, 32000, 2048, 8),
}


@dataclass(frozen=True)
class Table:
    """One part of the report."""

    title: str
    rows: list[dict[str, str]]
    notes: str = ""


class InMemory(NoStore):
    """Keeps entries in main memory, so that methods share statistics and spectra."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    @property
    def keeps(self) -> bool:
        return True

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key.digest)

    def put(self, key: Key, entry: Entry) -> Entry:
        tensors = {name: tensor.cpu() for name, tensor in entry.tensors.items()}
        self._entries[key.digest] = replace(entry, tensors=tensors)
        return self._entries[key.digest]


def attempted(head: dict[str, str], compute: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Return a row; one that fails says why and leaves the others alone."""
    try:
        return head | compute()
    except Exception as error:  # noqa: BLE001 (whatever a card or its driver raises)
        traceback.print_exc()
        return head | {"failed": f"{type(error).__name__}: {one_line(error)[:300]}"}


@dataclass(frozen=True)
class Setting:
    """The device and the size of the report, and its time limit."""

    device: torch.device
    size: Size
    seconds_at_most: float = 480.0
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the report should end."""
        return self.seconds_at_most - (time.monotonic() - self.started)

    def row(
        self, head: dict[str, str], needed: float, compute: Callable[[], dict[str, str]]
    ) -> dict[str, str]:
        """Return a row, if the seconds that it needs are left."""
        if self.left < needed:
            return head | {"skipped": "no time was left"}
        return attempted(head, compute)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The model's: half precision is slow on a CPU."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def name(self) -> str:
        """The card's name, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.cuda else "cpu"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def model(self, blocks: int | None = None) -> PreTrainedModel:
        """Return the random model, the same one every time."""
        size = self.size
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.inner,
            num_hidden_layers=blocks or size.blocks,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=2 * size.length,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def tokens(self) -> torch.Tensor:
        """Return random calibration windows (windows, length)."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.size.windows, self.size.length)
        return torch.randint(0, self.size.vocabulary, shape, generator=generator)

    def seconds(self, compute: Callable[[], object], budget: float = 0.3) -> float:
        """Return the mean seconds of a call, over as many as fit into a budget after a first."""
        compute()
        self.synchronize()
        started, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - started < budget:
            compute()
            self.synchronize()
            count += 1
        return (time.perf_counter() - started) / count
