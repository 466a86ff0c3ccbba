"""The spectra of the last run, for the next one to use if it differs only in what comes after."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from iosvd.fingerprints import spectra_digest
from iosvd.pipeline import Factorized
from iosvd.run import Run

log = logging.getLogger(__name__)


@dataclass
class RecentSpectra:
    """Keeps the spectra of one run in main memory."""

    _identity: str | None = None
    _factorized: Factorized | None = None

    def has(self, run: Run) -> bool:
        """Whether the run before computed what this one needs."""
        return self._identity == spectra_digest(run)

    def of(self, run: Run, compute: Callable[[], Factorized]) -> Factorized:
        """Return the spectra of a run; only if the run before had others are they computed."""
        if self._factorized is not None and self.has(run):
            log.info("statistics and spectra are those of the run before")
            return self._factorized
        self._identity = self._factorized = None  # Not two of them in memory.
        self._factorized = compute()
        self._identity = spectra_digest(run)
        return self._factorized
