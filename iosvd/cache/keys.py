"""Cache keys: everything that a cached value depends on, including the code that computes it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from iosvd.allocation.objective import Predictions
from iosvd.cache.code import code_digest
from iosvd.cache.store import Key
from iosvd.factorization import Factorization
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.needs import Needs
from iosvd.system.json_files import to_json
from iosvd.whitening import Whitening
from iosvd.windows import Windows


@dataclass(frozen=True)
class CacheKeys:
    """Keys of the statistics of one model on one calibration set."""

    model: str  # Identifies the weights and their dtype.
    tokens: str  # Hash of the windows that whiten.
    gradient_tokens: str  # Hash of the windows that score; often the same windows.

    @classmethod
    def of(cls, model: str, windows: Windows, gradient_windows: Windows | None) -> CacheKeys:
        """Hash the calibration windows.

        Args:
            model: identifies the model's weights.
            windows, gradient_windows: that calibrate.
        """
        first = windows_digest(windows)
        second = first if gradient_windows is None else windows_digest(gradient_windows)
        return cls(model, first, second)

    def statistic(self, name: str, part: Needs, site: str | None = None) -> Key:
        """Return the key of one statistic of a site, or of all sites.

        Args:
            name: the field of `Needs` that asks for it.
            part: the need for this statistic alone.
            site: None for the key that is locked while the statistic is collected.
        """
        of_gradient = part.gradient_windows > 0
        identity = {
            "model": self.model,
            "tokens": self.gradient_tokens if of_gradient else self.tokens,
            name: options_of(part)[name],
            "code": code_digest("statistics"),
        }
        return Key("statistics", _at(identity, site))

    def curvature(self, metric: KLMetric) -> Key:
        """Return the key of the KL curvature behind every block."""
        identity = {
            "model": self.model,
            "tokens": self.tokens,
            "curvature": options_of(metric),
            "code": code_digest("curvature"),
        }
        return Key("statistics", identity)


@dataclass(frozen=True)
class SpectrumKeys:
    """Keys of the spectra of one model and calibration set under one whitening."""

    calibration: CacheKeys
    whitening: Whitening
    factorization: Factorization

    def spectrum(self, site: str | None = None) -> Key:
        """Return the key of a site's spectrum, or of all spectra."""
        return Key("spectra", _at(self._identity(), site))

    def score(self, scored: Needs, site: str | None = None) -> Key:
        """Return the key of a site's scores; `scored` is what the allocation needs."""
        names = [
            self.calibration.statistic(name, part).digest
            for name, part in sorted(scored.parts().items())
        ]
        identity = {"spectra": self._identity(), "of": names, "code": code_digest("scores")}
        return Key("scores", _at(identity, site))

    def losses(self) -> Key:
        """Return the key that is locked while losses under these spectra are measured."""
        return Key("trials", self._losses())

    def loss(
        self, ranks: Mapping[str, int], windows: int, predictions: Predictions | None = None
    ) -> Key:
        """Return the key of the loss with these ranks on the first `windows` windows.

        With `predictions` it is that of their divergence.
        """
        of = {} if predictions is None else {"divergence": options_of(predictions)}
        return Key("trials", {**self._losses(), "ranks": dict(ranks), "windows": windows, **of})

    def block(
        self,
        sites: Collection[str],
        ranks: Mapping[str, int],
        steps: Mapping[str, Any],
        number: int,
    ) -> Key:
        """Return the key of a corrected block, which depends on all blocks before it.

        Args:
            sites: all of them.
            ranks: of those that are factorised.
            steps: what is done to each block.
            number: of the block.
        """
        return self._correction("blocks", sites, ranks, {"steps": steps, "block": number})

    def training(
        self,
        sites: Collection[str],
        ranks: Mapping[str, int],
        correction: Mapping[str, Any],
        epochs: int,
    ) -> Key:
        """Return the key of the state of a training of all blocks after some epochs.

        Args:
            sites, ranks: as above.
            correction: its class and all its options.
            epochs: 0 for the result of the training.
        """
        of = {"correction": correction, "epochs": epochs}
        return self._correction("trainings", sites, ranks, of)

    def _correction(
        self,
        kind: str,
        sites: Collection[str],
        ranks: Mapping[str, int],
        of: Mapping[str, Any],
    ) -> Key:
        identity = {
            "spectra": self._identity(),
            "tokens": self.calibration.tokens,
            "sites": list(sites),
            "ranks": dict(ranks),
            **of,
            "code": code_digest(kind, type(self.whitening)),
        }
        return Key(kind, identity)

    def _losses(self) -> dict[str, Any]:
        tokens = self.calibration.tokens
        return {"spectra": self._identity(), "tokens": tokens, "code": code_digest("trials")}

    def _identity(self) -> dict[str, Any]:
        needs = self.whitening.needs.parts()
        return {
            "model": self.calibration.model,
            "statistics": [
                self.calibration.statistic(name, part).digest
                for name, part in sorted(needs.items())
            ],
            "whitening": options_of(self.whitening),
            "factorization": options_of(self.factorization),
            "code": code_digest("spectra", type(self.whitening)),
        }


def tokens_key(identity: Mapping[str, Any]) -> Key:
    """Return the key of a text's windows."""
    return Key("tokens", {**identity, "code": code_digest("tokens")})


def options_of(value: Any) -> dict[str, Any]:
    """Return the class and the options of a dataclass, as JSON."""
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class": name, **to_json(value)}


def windows_digest(windows: Windows) -> str:
    """Return a hash of windows; that of their tokens if these are all."""
    digest = tensor_digest(windows.tokens)
    masks = {"filled": windows.filled, "counted": windows.counted}
    more = {name: tensor_digest(mask) for name, mask in masks.items() if mask is not None}
    for number, one in enumerate(windows.beside):
        more |= {f"{number} {name}": tensor_digest(value) for name, value in one.items()}
    if not more:
        return digest
    return hashlib.sha256(f"{digest} {sorted(more.items())}".encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return a hash of a tensor's values and shape."""
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()).hexdigest()


def _at(identity: dict[str, Any], site: str | None) -> dict[str, Any]:
    return identity if site is None else {**identity, "site": site}
