"""Build the wandb workspace that compares runs: method × ratio, perplexity curves, ranks.

    python experiments/workspace.py entity=TEAM project=iosvd texts=wikitext2,ptb,c4

Needs `pip install 'iosvd[dashboards]'`, a login, and runs logged with wandb=online. This file is
the description of the dashboard; `make dashboard` shows the same comparison without wandb.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from iosvd.errors import ConfigError, exit_in_one_line
from iosvd.runs.run import Tracking, TrackingMode
from iosvd.runs.tracking import check_tracking
from iosvd.system.commands import arguments

OPTIONS = {"entity": None, "project": "iosvd", "texts": "wikitext2,ptb,c4"}


def build_workspace(entity: str, project: str, texts: Sequence[str]) -> Any:
    """Describe the workspace; nothing leaves the machine until it is saved.

    Args:
        entity: the user or team on wandb.
        project: as in `wandb.project`.
        texts: keys of `eval.texts` whose perplexity is shown.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    # Any: it exports by star imports, which type checkers do not follow.
    panels: Any = import_module("wandb_workspaces.reports.v2")
    workspaces: Any = import_module("wandb_workspaces.workspaces")
    perplexities = [f"perplexity.{text}" for text in texts]
    by_method = [
        # One bar per run, whose name holds method and ratio.
        panels.BarPlot(title=name, metrics=[panels.SummaryMetric(name)])
        for name in (*perplexities, "average_acc")
    ]
    curves = [
        panels.ScatterPlot(
            title=f"{name} against {x}",
            x=panels.SummaryMetric(x),
            y=panels.SummaryMetric(name),
            log_y=name != "average_acc",
        )
        for x in ("ratio", "target_bytes")
        for name in (*perplexities, "average_acc")
    ]
    table = panels.ParallelCoordinatesPlot(
        title="method by ratio",
        columns=[
            panels.ParallelCoordinatesPlotColumn(panels.Config("label"), display_name="method"),
            panels.ParallelCoordinatesPlotColumn(panels.SummaryMetric("ratio")),
            *(
                panels.ParallelCoordinatesPlotColumn(panels.SummaryMetric(name), log=True)
                for name in perplexities
            ),
        ],
    )
    pictures = [
        panels.MediaBrowser(title=name, media_keys=[f"{name}_figure"])
        for name in ("ranks", "spectra")
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="iosvd: method by ratio",
        sections=[
            workspaces.Section("method by ratio", panels=[table, *by_method], is_open=True),
            workspaces.Section("curves", panels=curves, is_open=True),
            workspaces.Section("ranks and spectra", panels=pictures, is_open=True),
        ],
    )


def main(arguments: Sequence[str]) -> None:
    """Build the workspace on wandb and print where it is."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if unknown := sorted(set(given) - set(OPTIONS)):
        raise ConfigError(f"unknown option {unknown[0]}; options: {', '.join(OPTIONS)}")
    options = {**OPTIONS, **given}
    if options["entity"] is None:
        raise ConfigError("entity is not set; set entity=USER_OR_TEAM")
    check_tracking(Tracking(mode=TrackingMode.online))
    texts = str(options["texts"]).split(",")
    print(build_workspace(str(options["entity"]), str(options["project"]), texts).save().url)


if __name__ == "__main__":
    with exit_in_one_line():
        main(arguments(__doc__))
