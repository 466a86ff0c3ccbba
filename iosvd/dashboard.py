"""A static page that compares all complete runs of a results folder, without server or network."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iosvd.config import METHOD_GROUPS
from iosvd.errors import RecordError
from iosvd.models import ASSETS
from iosvd.plan import plan_frame
from iosvd.records import METRICS, PLAN, read_metrics, read_record

log = logging.getLogger(__name__)
_PLACE = "__RUNS__"


def read_runs(results: Path) -> list[dict[str, Any]]:
    """Return what the page shows of every complete run, in the order of models, labels, ratios.

    Runs that cannot be read are named in the log and left out.
    """
    found = []
    for path in sorted((results / "runs").glob(f"*/*/{METRICS}")):
        try:
            found.append(_run(path.parent))
        except (RecordError, OSError, ValueError, KeyError) as error:
            log.warning("left out: %s (%s)", path.parent, error)
    return sorted(found, key=lambda run: (run["setting"], run["label"] != "dense", run["label"]))


def to_page(runs: list[dict[str, Any]]) -> str:
    """Return the page with the runs inside."""
    page = (ASSETS / "dashboard" / "page.html").read_text(encoding="utf-8")
    # A script's text ends at the first "</", wherever it stands.
    return page.replace(_PLACE, json.dumps(runs).replace("</", "<\\/"))


def _run(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    assert record is not None
    metrics = read_metrics(folder)
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    measures = {f"{name}_ppl": value for name, value in record.perplexity.items()}
    measures |= record.accuracy
    if record.average_acc is not None and len(record.accuracy) > 1:
        measures["average_acc"] = record.average_acc
    return {
        "folder": folder.name,
        "setting": _setting(metrics["config"]),
        "label": record.label,
        "ratio": record.ratio,
        "target_bytes": record.target_bytes,
        "measures": measures,
        "started": record.started,
        "device": record.device,
        "commit": record.commit,
        "ranks": plan_frame(plan["sites"]).to_dict("records"),
    }


def _setting(config: Mapping[str, Any]) -> str:
    """Say what runs must share to be compared: the model, what calibrates, what is measured.

    A code stands for the options that it does not spell out, such as dtype and joins.
    """
    apart = (*METHOD_GROUPS, "ratio", "runtime", "wandb")
    shared = {key: value for key, value in config.items() if key not in apart}
    code = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:4]
    calibration, evaluation = config["calibration"], config["eval"]
    windows = f", first {evaluation['windows']} windows" if evaluation["windows"] else ""
    limit = evaluation["zero_shot"]["limit"]
    items = f", first {limit} items" if limit else ""
    measured = [text["name"] for text in evaluation["texts"].values()]
    measured += evaluation["zero_shot"]["tasks"]
    return (
        f"{config['model']['name']}: {calibration['windows']} × {calibration['seq_len']} tokens of"
        f" {config['dataset']['name']}, seed {calibration['seed']}; windows of"
        f" {evaluation['seq_len']}{windows}{items}: {', '.join(measured)} [{code}]"
    )
