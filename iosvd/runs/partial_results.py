"""Results of a run that is not complete yet, kept in its folder.

A killed run resumes after the last of them: no text or task is measured twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iosvd.errors import one_line
from iosvd.system.json_files import DamagedError, read_sealed, typed, write_sealed
from iosvd.system.logs import of_stage
from iosvd.system.timing import Stage, StageClock, measured

log = logging.getLogger(__name__)
PARTS = "parts.json"


@dataclass(frozen=True)
class _Part:
    result: Any
    cost: Stage


@dataclass(frozen=True)
class _Kept:
    """parts.json without its checksum."""

    identity: str
    parts: dict[str, _Part]


@dataclass(frozen=True)
class PartialResults:
    """Results by name, in a file; only one process at a time writes to the folder."""

    folder: Path
    identity: str  # Of the run and the code that measures it.
    clock: StageClock

    def of(self, stage: str, names: Iterable[str], measure: Callable[[str], Any]) -> dict[str, Any]:
        """Return the result of each name, as JSON; measure and keep those that are missing.

        Their cost, also of those measured earlier, is added to the stage.
        """
        self.clock.add(stage, Stage(0.0, 0))
        with of_stage(stage):
            return {name: self._of(stage, name, measure) for name in names}

    def _of(self, stage: str, name: str, measure: Callable[[str], Any]) -> Any:
        kept, key = self._read(), f"{stage}/{name}"
        if key not in kept:
            with measured() as took:
                result = measure(name)
            kept[key] = _Part(result, took())
            write_sealed(self.folder / PARTS, asdict(_Kept(self.identity, kept)))
            log.info("%s: %.1f s", name, took().seconds)
        else:
            log.info("%s: measured before the run was interrupted", name)
        self.clock.add(stage, kept[key].cost)
        return kept[key].result

    def _read(self) -> dict[str, _Part]:
        path = self.folder / PARTS
        try:
            found = typed(_Kept, read_sealed(path), str(path))
        except FileNotFoundError:
            return {}
        except DamagedError as error:
            log.warning("%s; its parts are measured again", one_line(error))
            return {}
        return found.parts if found.identity == self.identity else {}
