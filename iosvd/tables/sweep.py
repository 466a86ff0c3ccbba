"""The runs that a table expects, and their records on disk."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iosvd.errors import ConfigError, RecordError, check_name
from iosvd.runs.config import own_option
from iosvd.runs.fingerprints import digest
from iosvd.runs.records import Record, is_kept, read_record, record_folder
from iosvd.runs.run import Run
from iosvd.sweeps.expansion import baselines, expand
from iosvd.tables.published import read_published
from iosvd.tables.spec import TableSpec, table_spec
from iosvd.tables.spread import merged_over
from iosvd.tables.table import Found, Table, build_table


@dataclass(frozen=True)
class Sweep:
    """The runs of an experiment's table, dense baselines first."""

    experiment: str
    overrides: tuple[str, ...]  # Without the experiment.
    runs: tuple[Run, ...]

    @classmethod
    def from_overrides(cls, overrides: Sequence[str]) -> Sweep:
        """Expand the overrides of a sweep, one of which names the experiment.

        Raises:
            ConfigError: there is no experiment, or another option is wrong.
        """
        named, rest = own_option(overrides, "experiment")
        if named is None:
            raise ConfigError("no experiment given; for instance experiment=main")
        check_name("experiment", named)
        runs = (*baselines(overrides), *expand(overrides, sweep=True))
        return cls(named, tuple(rest), runs)

    @property
    def results(self) -> Path:
        return Path(self.runs[0].runtime.output.results)

    @property
    def name(self) -> str:
        """The name of the table's files: a sweep over models is named by the experiment alone."""
        models = {run.model.name for run in self.runs}
        return f"{self.experiment}-{models.pop()}" if len(models) == 1 else self.experiment

    @property
    def command(self) -> str:
        """The command that makes the table."""
        arguments = shlex.quote(" ".join(self.overrides))
        return f"make table-{self.experiment}" + (f" ARGS={arguments}" if self.overrides else "")


@dataclass(frozen=True)
class OnDisk:
    """The runs with their records, and why some records were set aside."""

    found: tuple[Found, ...]
    set_aside: tuple[str, ...]
    kept: int = 0  # Records that come from git rather than from a run here.

    @property
    def records(self) -> list[Record]:
        return [found.record for found in self.found if found.record is not None]


@dataclass(frozen=True)
class SweepTable:
    """The current table of a sweep, and what it was made from."""

    sweep: Sweep
    spec: TableSpec
    on_disk: OnDisk
    found: tuple[Found, ...]  # The rows: the runs, or means over several.
    table: Table


def read_table(overrides: Sequence[str]) -> SweepTable:
    """Build the table of the sweep that these overrides describe from what is on disk."""
    sweep = Sweep.from_overrides(overrides)
    spec, on_disk = table_spec(sweep.experiment), find(sweep)
    found = on_disk.found if spec.spread is None else tuple(merged_over(spec.spread, on_disk.found))
    return SweepTable(sweep, spec, on_disk, found, build_table(spec, found, read_published()))


def find(sweep: Sweep) -> OnDisk:
    """Read the record of every run; one that cannot be trusted is a gap with a reason."""
    found, reasons, kept = [], [], 0
    for run in sweep.runs:
        folder = record_folder(run)
        try:
            found.append(Found(run, _trusted(run, folder)))
            kept += found[-1].record is not None and is_kept(folder)
        except RecordError as error:
            found.append(Found(run, None))
            reasons.append(str(error))
    return OnDisk(tuple(found), tuple(reasons), kept)


def _trusted(run: Run, folder: Path) -> Record | None:
    record = read_record(folder)
    if record is not None and record.digest != digest(run):
        raise RecordError(
            f"{folder} holds the record of another protocol (digest {record.digest});"
            " remove it and run again"
        )
    return record
