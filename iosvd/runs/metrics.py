"""Types of the parts of a run's JSON files that readers use, to check the files against."""

from __future__ import annotations

from dataclasses import dataclass, field

from iosvd.errors import shortened
from iosvd.evaluation.divergence import Divergence
from iosvd.models.gguf import GgufFile
from iosvd.plan import SitePlan
from iosvd.system.json_files import DamagedError

_LONGEST_NAME = 1000  # Characters of a site's.


@dataclass(frozen=True)
class SiteDivergence(Divergence):
    """Measured and predicted divergence of one site truncated alone."""

    predicted_kl: float | None
    predicted_loss_change: float | None


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class _Windows:
    windows: int
    seq_len: int
    seed: int


@dataclass(frozen=True)
class _Tasks:
    tasks: list[str]
    limit: int


@dataclass(frozen=True)
class _Evaluation:
    texts: dict[str, _Named]
    seq_len: int
    windows: int
    zero_shot: _Tasks
    questions: dict[str, _Named] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """The composed options that readers use; metrics.json holds all of them."""

    model: _Named
    dataset: _Named
    calibration: _Windows
    eval: _Evaluation


@dataclass(frozen=True)
class _Accuracy:
    acc: float


@dataclass(frozen=True)
class _Questions:
    acc: float
    acc_likeliest: float
    unanswered: int


@dataclass(frozen=True)
class Metrics:
    """The fields of metrics.json that readers use."""

    digest: str
    label: str
    ratio: float
    ratio_achieved: float
    target_bytes: int
    predicted_kl: float | None
    predicted_loss_change: float | None
    perplexity: dict[str, float]
    zero_shot: dict[str, _Accuracy]
    average_acc: float | None
    compression_seconds: float
    started: str
    device: str
    model_revision: str | None
    commit: str
    config: Config
    model_file: GgufFile | None = None
    questions: dict[str, _Questions] = field(default_factory=dict)
    cache_ratio: float | None = None  # Earlier records have neither.
    whole_ratio: float | None = None
    divergence: dict[str, Divergence] = field(default_factory=dict)
    site_divergence: dict[str, dict[str, SiteDivergence]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = {"ratio": self.ratio, **self.perplexity}
        for name, value in positive.items():
            if not value > 0:
                raise DamagedError(f"{name} is {value:g}, not above 0")
        if not 0 <= self.target_bytes < 2**60:
            raise DamagedError("target_bytes is no size of a model")
        texts = {*self.perplexity, *self.divergence, *self.site_divergence}
        if unknown := sorted(texts - set(self.config.eval.texts)):
            raise DamagedError(f"it measures {unknown[0]}, which is no text of its config")
        if unknown := sorted(set(self.questions) - set(self.config.eval.questions)):
            raise DamagedError(f"it has answers to {unknown[0]}, which its config does not ask")


@dataclass(frozen=True)
class Failure:
    """failure.json."""

    error: str


@dataclass(frozen=True)
class SitePlans:
    """plan.json, as far as readers need it."""

    sites: dict[str, SitePlan]

    def __post_init__(self) -> None:
        if not self.sites:
            raise DamagedError("plan.json has no site")
        for name, site in self.sites.items():
            sizes = (site.out_features, site.in_features, site.rank, site.bits)
            if len(name) > _LONGEST_NAME or not all(0 < size < 2**50 for size in sizes):
                raise DamagedError(f"plan.json gives {shortened(name, 80)} impossible sizes")
