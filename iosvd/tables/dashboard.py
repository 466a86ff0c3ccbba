"""A static page that compares all complete runs of a results folder, without server or network."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iosvd.errors import RecordError, one_line, plain
from iosvd.metric import Kind
from iosvd.models.loading import ASSETS
from iosvd.plan import plan_frame
from iosvd.runs.config import METHOD_GROUPS
from iosvd.runs.metrics import Config
from iosvd.runs.records import METRICS, read_both, read_plan, record_of

log = logging.getLogger(__name__)
_PLACE = "__RUNS__"


def read_runs(results: Path) -> list[dict[str, Any]]:
    """Return the data of every complete run for the page, ordered by model, label and ratio.

    Runs that cannot be read are named in the log and left out.
    """
    found = []
    for path in sorted((results / "runs").glob(f"*/*/{METRICS}")):
        try:
            found.append(_run(path.parent))
        except (RecordError, RecursionError) as error:  # A damaged config may be nested too deeply.
            log.warning("left out: %s (%s)", plain(str(path.parent)), one_line(error))
    return sorted(found, key=lambda run: (run["setting"], run["label"] != "dense", run["label"]))


def to_page(runs: list[dict[str, Any]]) -> str:
    """Return the page with the runs inside."""
    page = (ASSETS / "dashboard" / "page.html").read_text(encoding="utf-8")
    # Inside a script "</script" would end it, and "<!--<script" would swallow the rest of the page.
    return page.replace(_PLACE, json.dumps(runs, allow_nan=False).replace("<", "\\u003c"))


def _run(folder: Path) -> dict[str, Any]:
    (written, metrics), plan = read_both(folder), read_plan(folder)
    record = record_of(metrics)
    shown = [m for m in record.values if m.kind is not Kind.other]
    if sum(m.kind is Kind.accuracy for m in shown) == 1:
        shown = [m for m in shown if m.kind is not Kind.average_accuracy]
    return {
        "folder": folder.name,
        "setting": plain(_setting(written["config"], metrics.config)),
        "label": record.label,
        "ratio": record.ratio,
        "target_bytes": record.target_bytes,
        "measures": {metric.name: record.values[metric] for metric in shown},
        "started": record.started,
        "device": record.device,
        "commit": record.commit,
        "ranks": plan_frame(plan["sites"]).to_dict("records"),
    }


def _setting(config: Mapping[str, Any], c: Config) -> str:
    """Describe what runs must share to be comparable: model, calibration, evaluation.

    A code stands for options that are not spelled out, such as dtype and joins.

    Args:
        config: the recorded options of a run.
        c: its typed fields.
    """
    apart = (*METHOD_GROUPS, "ratio", "runtime", "wandb")
    shared = {key: value for key, value in config.items() if key not in apart}
    if shared.get("cache_tokens") == 0:  # Earlier records lack the option.
        del shared["cache_tokens"]
    code = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:4]
    windows = f", first {c.eval.windows} windows" if c.eval.windows else ""
    items = f", first {c.eval.zero_shot.limit} items" if c.eval.zero_shot.limit else ""
    measured = [text.name for text in c.eval.texts.values()] + c.eval.zero_shot.tasks
    return (
        f"{c.model.name}: {c.calibration.windows} × {c.calibration.seq_len} tokens of"
        f" {c.dataset.name}, seed {c.calibration.seed}; windows of"
        f" {c.eval.seq_len}{windows}{items}: {', '.join(measured)} [{code}]"
    )
