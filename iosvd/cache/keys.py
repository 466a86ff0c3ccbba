"""What a cached value depends on: texts, model, options, and the code that computes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from torch import Tensor

from iosvd.cache.code import code_digest
from iosvd.cache.store import Key
from iosvd.factorization import Factorization
from iosvd.statistics.needs import Needs
from iosvd.whitening import Whitening


@dataclass(frozen=True)
class Keys:
    """The keys of what is computed for one model, calibration set and whitening."""

    model: str  # Of its weights and their dtype.
    tokens: str  # Of the windows that whiten.
    gradient_tokens: str  # Of the windows that score: the same, unless told otherwise.
    whitening: Mapping[str, Any]
    factorization: Mapping[str, Any]
    spectra_code: str  # Of what computes spectra, the whitening's too.

    @classmethod
    def of(
        cls,
        model: str,
        tokens: Tensor,
        gradient_tokens: Tensor | None,
        whitening: Whitening,
        factorization: Factorization,
    ) -> Keys:
        """Name them by content.

        Args:
            model: what tells the model's weights from all others.
            tokens, gradient_tokens: calibration windows (windows, length).
            whitening, factorization: how spectra are computed.
        """
        first = tensor_digest(tokens)
        second = first if gradient_tokens is None else tensor_digest(gradient_tokens)
        return cls(
            model=model,
            tokens=first,
            gradient_tokens=second,
            whitening=options_of(whitening),
            factorization=options_of(factorization),
            spectra_code=code_digest("spectra", type(whitening)),
        )

    def statistic(self, name: str, part: Needs, site: str | None = None) -> Key:
        """Name one statistic of a site (None: of all sites), `part` being the need of it alone."""
        of_gradient = part.gradient_windows > 0
        identity = {
            "model": self.model,
            "tokens": self.gradient_tokens if of_gradient else self.tokens,
            name: options_of(part)[name],
            "code": code_digest("statistics"),
        }
        return Key("statistics", _at(identity, site))

    def spectrum(self, needs: Needs, site: str | None = None) -> Key:
        """Name the spectrum of a site (None: of all sites); `needs` are the whitening's."""
        return Key("spectra", _at(self._spectra(needs), site))

    def score(self, needs: Needs, scored: Needs, site: str | None = None) -> Key:
        """Name what the loss tells of a site; `scored` is what the allocation needs."""
        names = [self.statistic(name, part).digest for name, part in sorted(scored.parts().items())]
        identity = {"spectra": self._spectra(needs), "of": names, "code": code_digest("scores")}
        return Key("scores", _at(identity, site))

    def trials(self, needs: Needs) -> Key:
        """Name all losses that are measured with the ranks of these spectra."""
        identity = {
            "spectra": self._spectra(needs),
            "tokens": self.tokens,
            "code": code_digest("trials"),
        }
        return Key("trials", identity)

    def trial(self, needs: Needs, ranks: Mapping[str, int], windows: int) -> Key:
        """Name the loss that is measured with these ranks on the first so many windows."""
        identity = self.trials(needs).identity
        return Key("trials", {**identity, "ranks": dict(ranks), "windows": windows})

    def _spectra(self, needs: Needs) -> dict[str, Any]:
        names = [self.statistic(name, part).digest for name, part in sorted(needs.parts().items())]
        return {
            "model": self.model,
            "statistics": names,
            "whitening": self.whitening,
            "factorization": self.factorization,
            "code": self.spectra_code,
        }


def tokens_key(identity: Mapping[str, Any]) -> Key:
    """Name the windows of a text."""
    return Key("tokens", {**identity, "code": code_digest("tokens")})


def options_of(value: Any) -> dict[str, Any]:
    """Return the options of a dataclass and its class, as JSON."""
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class": name, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)}}


def tensor_digest(tensor: Tensor) -> str:
    """Return a hash of a tensor's values and shape."""
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()).hexdigest()


def _at(identity: dict[str, Any], site: str | None) -> dict[str, Any]:
    return identity if site is None else {**identity, "site": site}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(inside) for key, inside in asdict(value).items()}
    return value
