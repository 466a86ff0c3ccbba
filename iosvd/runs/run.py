"""The values that define a run; config.py builds and checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from iosvd.data.texts import Dataset
from iosvd.data.visual import VisualDataset
from iosvd.errors import ConfigError
from iosvd.evaluation.zero_shot import ZeroShot
from iosvd.method import Goal, Method
from iosvd.models.loading import Model
from iosvd.windows import Windows


class Halves(Enum):
    """Windows that whiten and that score: all do both; the first half does both; or half each."""

    none = "none"
    same = "same"
    other = "other"


@dataclass(frozen=True)
class CalibrationOptions:
    """The windows of the calibration split, and what they are used for."""

    windows: int = 256
    seq_len: int = 2048
    seed: int = 0
    halves: Halves = Halves.none

    @property
    def windows_each(self) -> int:
        """Number of windows that whiten, and of windows for the gradient."""
        return self.windows if self.halves is Halves.none else self.windows // 2

    def divided(self, windows: Windows) -> tuple[Windows, Windows | None]:
        """Return the windows that whiten, and the windows of the gradient if they differ."""
        middle = len(windows) // 2
        first, second = windows[:middle], windows[middle:]
        if self.halves is Halves.none:
            return windows, None
        return first, (second if self.halves is Halves.other else None)


class KL(Enum):
    """Measurements of the exact divergence from the dense model."""

    none = "none"
    model = "model"
    sites = "sites"  # The model's, and with one site truncated at a time.


@dataclass(frozen=True)
class Evaluation:
    """Texts and windows of perplexity, and tasks and questions of accuracy."""

    texts: dict[str, Any] = field(default_factory=dict)  # Data sets by key.
    questions: dict[str, Any] = field(default_factory=dict)  # Visual data sets by key.
    seq_len: int = 2048
    windows: int = 0
    kl: KL = KL.none
    kl_windows: int = 0
    zero_shot: ZeroShot = field(default_factory=ZeroShot)


@dataclass(frozen=True)
class Resources:
    """Devices and memory of a run; they change results only by rounding."""

    device: str = "auto"
    device_map: str | None = None
    batch_tokens: int = 2048
    batch_requests: int = 32
    memory_gib: float | None = None
    metrics_on_cpu: bool = False
    blocks_on_cpu: bool = False
    checkpoint_blocks: bool = False


@dataclass(frozen=True)
class Output:
    """Output folders, and what a run keeps and replaces there."""

    results: str = "results"
    cache: str = "results/cache"
    cache_gib: float = 200.0
    save_checkpoint: bool = False
    force: bool = False


@dataclass(frozen=True)
class Parallelism:
    """The share of this machine that each of several parallel runs takes."""

    workers: int = 1
    threads: int | None = None
    gpu_per_worker: bool = False


class TrackingMode(Enum):
    """Whether runs are logged to wandb, and whether anything leaves the machine."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(frozen=True)
class Tracking:
    """Options of wandb; nothing here changes what is measured."""

    mode: TrackingMode = TrackingMode.disabled
    project: str = "iosvd"
    entity: str | None = None
    group: str | None = None  # The sweep.
    checkpoint: bool = False  # Upload the compressed model as an artifact.


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out; nothing here changes what it measures, except by rounding."""

    resources: Resources = field(default_factory=Resources)
    output: Output = field(default_factory=Output)
    parallel: Parallelism = field(default_factory=Parallelism)
    tracking: Tracking = field(default_factory=Tracking)


@dataclass(frozen=True)
class Data:
    """The text or the questions about images that calibrate, and the windows drawn from them."""

    dataset: Dataset | VisualDataset
    calibration: CalibrationOptions

    @property
    def text(self) -> Dataset:
        """The data set, where only a text will do.

        Raises:
            ConfigError: it holds questions about images.
        """
        if isinstance(self.dataset, VisualDataset):
            raise ConfigError(
                f"this command needs a text, and dataset={self.dataset.name} holds questions about"
                " images; choose another dataset"
            )
        return self.dataset


@dataclass(frozen=True)
class Run:
    """One cell of a table: everything a run depends on."""

    label: str  # The method's name in tables, with the changes to its preset.
    model: Model
    data: Data
    method: Method
    goal: Goal
    eval: Evaluation
    runtime: Runtime

    @property
    def sees(self) -> bool:
        """Whether it shows images to its model, or questions that are about images."""
        return isinstance(self.data.dataset, VisualDataset) or bool(self.eval.questions)
