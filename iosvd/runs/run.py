"""What a run is made of: one frozen value for each group of options, checked by config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from iosvd.allocation import Allocation
from iosvd.correction import Correction
from iosvd.data.texts import Dataset
from iosvd.evaluation.zero_shot import ZeroShot
from iosvd.factorization import Factorization
from iosvd.models.loading import Model
from iosvd.quantization import Quantization
from iosvd.whitening import Whitening


class Halves(Enum):
    """Which windows whiten and which score: all both; the first half both; or half each."""

    none = "none"
    same = "same"
    other = "other"


@dataclass(frozen=True)
class Calibration:
    """Which windows of the data set's calibration split are used, and for what."""

    windows: int = 256
    seq_len: int = 2048
    seed: int = 0
    halves: Halves = Halves.none

    @property
    def windows_each(self) -> int:
        """Windows that whiten, and windows there are for the gradient."""
        return self.windows if self.halves is Halves.none else self.windows // 2

    def divided(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the windows that whiten, and those of the gradient if they are others."""
        first, second = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        if self.halves is Halves.none:
            return tokens, None
        return first, (second if self.halves is Halves.other else None)


class KL(Enum):
    """Whether the exact divergence from the dense model is measured, and of what."""

    none = "none"
    model = "model"
    sites = "sites"  # And with one site truncated at a time.


@dataclass(frozen=True)
class Evaluation:
    """On which texts perplexity is measured, in which windows, and on which tasks accuracy is."""

    texts: dict[str, Any] = field(default_factory=dict)  # Dataset, by the name of the column.
    seq_len: int = 2048
    windows: int = 0
    kl: KL = KL.none
    kl_windows: int = 0
    zero_shot: ZeroShot = field(default_factory=ZeroShot)


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out; nothing here changes what it measures, but by rounding."""

    device: str = "auto"
    device_map: str | None = None
    batch_tokens: int = 2048
    batch_requests: int = 32
    workers: int = 1
    threads: int | None = None
    gpu_per_worker: bool = False
    memory_gib: float | None = None
    metrics_on_cpu: bool = False
    checkpoint_blocks: bool = False
    results: str = "results"
    cache: str = "results/cache"
    cache_gib: float = 200.0
    save_checkpoint: bool = False
    force: bool = False


class TrackingMode(Enum):
    """Whether anything is logged, and whether it leaves the machine."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(frozen=True)
class Tracking:
    """Whether and where runs are logged to wandb; nothing here changes what is measured."""

    mode: TrackingMode = TrackingMode.disabled
    project: str = "iosvd"
    entity: str | None = None
    group: str | None = None  # The sweep.
    checkpoint: bool = False  # Upload the compressed model as an artifact.


@dataclass(frozen=True)
class Run:
    """One cell of a table: everything a run depends on."""

    label: str  # The method's name in tables; names what was changed from its preset.
    model: Model
    dataset: Dataset
    calibration: Calibration
    whitening: Whitening
    allocation: Allocation
    correction: Correction
    quantization: Quantization
    factorization: Factorization
    ratio: float | None  # None: what target_kl needs.
    target_kl: float | None
    min_rank_fraction: float
    eval: Evaluation
    runtime: Runtime
    wandb: Tracking
    config: dict[str, Any]  # The same as composed, for the record.
