"""Log runs to wandb on request; everything is read back from the run's folder.

This is the only file that uses wandb. Each run has one wandb run, whose id is the run's digest: a
run that failed and is tried again, or was complete before tracking was on, continues there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iosvd.errors import ConfigError, extra, one_line
from iosvd.plan import plan_frame
from iosvd.runs.config import config_of
from iosvd.runs.fingerprints import digest
from iosvd.runs.records import CHECKPOINT, TRACKED, read_metrics, read_plan_and_spectra
from iosvd.runs.run import Run, Tracking, TrackingMode
from iosvd.system.json_files import write_json

if TYPE_CHECKING:  # Takes a second to import; most runs do not need it.
    import pandas
    import wandb
    from matplotlib.figure import Figure
    from PIL.Image import Image

log = logging.getLogger(__name__)


def check_tracking(tracking: Tracking) -> None:
    """Raise ConfigError if online logging cannot work, before the first run.

    Raises:
        ConfigError: wandb has no key.
    """
    if tracking.mode is not TrackingMode.online:
        return
    with extra("wandb"):
        import wandb
    try:
        reason = None if wandb.login(prompt=False) else "there is no key"
    except Exception as error:  # noqa: BLE001 (wandb raises many types, for instance for a bad key)
        reason = one_line(error)
    if reason is not None:
        raise ConfigError(
            f"wandb=online, but {reason}: set WANDB_API_KEY or call `wandb login`,"
            " or take wandb=offline and upload with `wandb sync` later"
        )


@contextmanager
def tracked(run: Run, folder: Path) -> Iterator[None]:
    """Keep the wandb run of a cell open, and log the cell to it when it is complete.

    An exception inside marks the wandb run as failed. Errors of wandb itself are warnings: a
    dashboard must not cost a measurement.
    """
    if run.runtime.tracking.mode is TrackingMode.disabled:
        yield
        return
    opened = None
    config = {**config_of(run), "label": run.label}  # Dashboards group by it.
    with _forgiven("this run is not logged"):
        opened = open_run(run, folder.name, digest(run), config=config)
    try:
        yield
    except BaseException:
        with _forgiven("the failure is not logged"):
            if opened is not None:
                opened.finish(exit_code=1)
        raise
    with _forgiven("complete, but not logged; launch it again to log it"):
        if opened is not None:
            log_complete(opened, folder, checkpoint=run.runtime.tracking.checkpoint)
            opened.finish()
            write_json(folder / TRACKED, {"id": opened.id, "mode": run.runtime.tracking.mode.value})


@contextmanager
def _forgiven(consequence: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 (wandb raises many types)
        log.warning("wandb: %s (%s)", consequence, one_line(error))


def open_run(run: Run, name: str, identity: str, **options: Any) -> wandb.Run:
    """Open the wandb run of a run; the same identity continues the same wandb run.

    Files go to `<results>/wandb`.
    """
    import wandb

    tracking, results = run.runtime.tracking, Path(run.runtime.output.results)
    results.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        name=name,
        id=identity,
        # Offline there is nothing to resume from; `wandb sync` merges runs with the same id.
        resume="allow" if tracking.mode is TrackingMode.online else None,
        dir=str(results),
        mode=tracking.mode.value,
        reinit="finish_previous",  # Otherwise a second run of this process would get the first one.
        **options,
    )


def log_complete(run: wandb.Run, folder: Path, checkpoint: bool = False) -> None:
    """Log a complete run: metrics.json as the summary, plan and spectra as media.

    Args:
        run: an open wandb run.
        folder: of a complete run.
        checkpoint: upload the compressed model, if the folder holds it, as an artifact.
    """
    import wandb

    from iosvd import figures

    plan, sigma = read_plan_and_spectra(folder)
    pictures = {"ranks": figures.rank_map(plan["sites"]), "spectra": figures.spectra(sigma)}
    log_media(run, {"plan": plan_frame(plan["sites"])}, pictures)
    run.summary.update(read_metrics(folder))
    if checkpoint and (folder / CHECKPOINT).is_dir():
        artifact = wandb.Artifact(f"{run.id}-checkpoint", type="model")
        artifact.add_dir(str(folder / CHECKPOINT))
        run.log_artifact(artifact)


def log_sweep(
    sweep: str,
    example: Run,
    tables: Mapping[str, pandas.DataFrame],
    figures: Mapping[str, Figure],
) -> None:
    """Log the tables and figures of a sweep, in a wandb run of its own."""
    if example.runtime.tracking.mode is TrackingMode.disabled:
        return
    with _forgiven("the sweep is not logged"):
        run = open_run(example, sweep, f"sweep-{sweep}", job_type="sweep")
        log_media(run, tables, figures)
        run.finish()


def log_media(
    run: wandb.Run, tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, Figure]
) -> None:
    """Log data frames as tables and figures as images."""
    import wandb

    run.log({name: _table(frame) for name, frame in tables.items()})
    pictures = {f"{name}_figure": _picture(figure) for name, figure in figures.items()}
    run.log({name: wandb.Image(picture) for name, picture in pictures.items()})


def _table(frame: pandas.DataFrame) -> wandb.Table:
    import wandb

    # Gaps would make columns of mixed types.
    return wandb.Table(dataframe=frame, allow_mixed_types=True)


def _picture(figure: Figure) -> Image:
    import PIL.Image

    drawn = BytesIO()
    # wandb would convert the figure through pyplot, which is global state.
    figure.savefig(drawn, format="png", dpi=120)
    return PIL.Image.open(drawn)
