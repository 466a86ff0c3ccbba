"""Factors in the model's own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iosvd.types import Factors, Needs


@dataclass(frozen=True)
class NoQuantization:
    """Every entry of every factor keeps the model's dtype."""

    @property
    def needs(self) -> Needs:
        return Needs()

    def __call__(self, factors: Mapping[str, Factors]) -> dict[str, Factors]:
        return dict(factors)
