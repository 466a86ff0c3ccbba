"""Draw the figures of an experiment from the runs that are complete.

    python experiments/draw.py experiment=main model=tiny dataset=pydoc eval=pydoc
    python experiments/draw.py format=pdf experiment=main …

Takes the overrides of the sweep itself; conf/table/<experiment>.yaml lists the figures. Writes
<results>/figures/<experiment>-<model>-<figure>.png, or another format.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pandas
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from iosvd import figures
from iosvd.errors import ConfigError, RecordError, exit_in_one_line
from iosvd.figures import DENSE
from iosvd.metric import AVERAGE, Metric
from iosvd.runs.config import METHOD_GROUPS, config_of, own_option
from iosvd.runs.records import read_metrics, read_plan_and_spectra, record_folder, run_folder
from iosvd.runs.run import Run
from iosvd.runs.tracking import log_sweep
from iosvd.system.commands import arguments
from iosvd.system.files import made, written_whole
from iosvd.tables.frame import to_frame
from iosvd.tables.spec import TableSpec
from iosvd.tables.spread import without_option
from iosvd.tables.sweep import OnDisk, SweepTable, read_table
from iosvd.tables.table import Found, Table

log = logging.getLogger("iosvd.draw")
# Without dates and versions, so that the same runs give the same file.
FORMATS = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def draw(overrides: list[str]) -> list[Path]:
    """Draw every figure of a table's preset; return their paths."""
    given, rest = own_option(overrides, "format")
    form = "png" if given is None else given
    if form not in FORMATS:
        raise ConfigError(f"format={form} is unknown; formats: {', '.join(FORMATS)}")
    read = read_table(rest)
    sweep = read.sweep
    drawn = _curves(read) | _predictions(read) | _runs(read.spec, read.on_disk)
    folder = made(sweep.results / "figures")
    paths = {name: folder / f"{sweep.name}-{name}.{form}" for name in drawn}
    for name, figure in drawn.items():
        with written_whole(paths[name]) as partial:
            figure.savefig(partial, dpi=120, format=form, metadata=FORMATS[form])
    log_sweep(sweep.name, sweep.runs[0], {}, drawn)
    return list(paths.values())


def _curves(read: SweepTable) -> dict[str, Figure]:
    """Draw quality against each of the preset's axes."""
    if not read.on_disk.records:
        return {}
    table, frame = read.table, to_frame(read.table)
    titles = _titles(table)
    drawn = {}
    for x in read.spec.curves:
        if "." in x:
            frame[x] = frame["label"].map(_option_by_label(x, read.found))
            frame["line"] = _lines(x, frame, read.found)
            drawn[x] = figures.quality_against_option(frame, x, _measures(table), titles)
        else:
            drawn[x] = figures.quality_against(frame, x, _measures(table), titles)
    return drawn


def _titles(table: Table) -> dict[str, str]:
    """Return what to write for a measured column, or an axis."""
    # A column of published values may have the same metric.
    titles = {column.metric.name: column.title for column in table.columns if not column.reference}
    return titles | {"ratio": "maintenance ratio", "target_bytes": "bytes of the target layers"}


def _measures(table: Table) -> list[Metric]:
    """Perplexities, and the average accuracy, or that of the one task."""
    measured = [c for c in table.columns if c.better and not c.reference]
    tasks = [c.metric for c in measured if not c.metric.is_perplexity]
    shown = [AVERAGE] if AVERAGE in tasks else tasks
    return [c.metric for c in measured if c.metric.is_perplexity] + shown


def _option_by_label(option: str, found: Sequence[Found]) -> dict[str, object]:
    runs = [one.run for one in found]
    return {run.label: OmegaConf.select(OmegaConf.create(config_of(run)), option) for run in runs}


def _lines(option: str, frame: pandas.DataFrame, found: Sequence[Found]) -> list[str]:
    """Name the line of each row: rows that differ in this option alone are one, at one ratio."""
    group, _, name = option.partition(".")

    def rest(run: Run) -> str:
        kept = {key: config_of(run)[key] for key in ("dataset", "calibration", *METHOD_GROUPS)}
        kept[group] = {key: v for key, v in config_of(run)[group].items() if key != name}
        return json.dumps(kept, sort_keys=True)

    kinds = {one.run.label: rest(one.run) for one in found if one.run.label != DENSE}
    names: dict[str, str] = {}
    for label, kind in kinds.items():  # Named after its first row.
        names.setdefault(kind, without_option(option, label))
    several = len(names) > 1
    return [
        f"{names[kinds[label]] + ', ' if several and label in kinds else ''}ratio {ratio:g}"
        for label, ratio in zip(frame["label"], frame["ratio"], strict=True)
    ]


def _predictions(read: SweepTable) -> dict[str, Figure]:
    """Draw predicted against measured divergence, on the first text."""
    whole, sites = [], []
    for one in read.on_disk.found:
        if not read.spec.predictions or one.record is None or one.run.label == DENSE:
            continue
        metrics = read_metrics(record_folder(one.run))
        if not metrics.get("site_divergence"):
            raise ConfigError("this figure needs runs with eval.kl=sites")
        text = next(iter(metrics["divergence"]))
        about = {"method": one.run.label, "ratio": one.ratio}
        planned = {k: metrics[k] for k in ("predicted_kl", "predicted_loss_change")}
        whole.append(about | planned | metrics["divergence"][text])
        sites += [about | site for site in metrics["site_divergence"][text].values()]
    if not whole:
        return {}
    return {"predictions": figures.predictions(pandas.DataFrame(whole), pandas.DataFrame(sites))}


def _runs(spec: TableSpec, on_disk: OnDisk) -> dict[str, Figure]:
    """Draw the ranks and the spectra of the preset's chosen run."""
    drawn = {}
    for label, ratio in spec.shown_run.items():
        for found in on_disk.found:
            cell = (found.run.label, found.run.goal.ratio)
            if cell == (label, ratio) and found.record is not None:
                try:
                    plan, sigma = read_plan_and_spectra(run_folder(found.run))
                except RecordError as error:
                    log.warning("left out: %s", error)
                    continue
                drawn[f"ranks-{label}-{ratio:g}"] = figures.rank_map(plan["sites"])
                drawn[f"spectra-{label}"] = figures.spectra(sigma)
    return drawn


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    with exit_in_one_line():
        for path in draw(arguments(__doc__)):
            print(path)
