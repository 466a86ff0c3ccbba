"""Mean and spread over runs that differ in one option, for instance over seeds."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas

from iosvd.errors import RecordError
from iosvd.metric import other
from iosvd.plan import plan_frame
from iosvd.runs.config import label
from iosvd.runs.records import Record, read_plan, run_folder
from iosvd.tables.table import Found

RANK_AGREEMENT = other("rank_agreement")


def merged_over(option: str, found: Sequence[Found]) -> list[Found]:
    """Make one row of the runs that differ in this option alone; gaps are left out of the mean."""
    groups: dict[tuple[str, str, float | None], list[Found]] = {}
    for one in found:
        name = without_option(option, one.run.label)
        groups.setdefault((one.run.model.name, name, one.ratio), []).append(one)
    return [
        Found(
            replace(members[0].run, label=name),
            _mean([member for member in members if member.record is not None]),
        )
        for (_, name, _), members in groups.items()
    ]


def without_option(option: str, name: str) -> str:
    """Return a row's label without one of the options that it names."""
    method, _, changed = name.removesuffix("]").partition("[")
    # A comma divides options only where a name follows it.
    rest = [
        o for o in re.split(r",(?=[\w.@/+~]+=)", changed) if o and not o.startswith(f"{option}=")
    ]
    return label(method, rest)


def _mean(found: Sequence[Found]) -> Record | None:
    records = [one.record for one in found if one.record is not None]
    if not records:
        return None
    first = records[0]

    common = [metric for metric in first.values if all(metric in r.values for r in records)]
    merged = replace(
        first,
        values={m: statistics.mean(r.values[m] for r in records) for m in common},
        ratio_achieved=statistics.mean(record.ratio_achieved for record in records),
        target_bytes=round(statistics.mean(record.target_bytes for record in records)),
        seconds=statistics.mean(record.seconds for record in records),
        commit=", ".join(dict.fromkeys(record.commit for record in records)),
    )
    if len(records) == 1:
        return merged
    spread = {m: statistics.stdev(r.values[m] for r in records) for m in common}
    agreement = _rank_agreement(found)
    more = {} if agreement is None else {RANK_AGREEMENT: agreement}
    return replace(merged, spread=spread, values={**merged.values, **more})


def _rank_agreement(found: Sequence[Found]) -> float | None:
    """Mean Spearman correlation, over pairs of runs, of the shares that the sites keep."""
    try:
        plans: list[dict[str, Any]] = [read_plan(run_folder(one.run)) for one in found]
    except RecordError:
        return None
    kept = {i: plan_frame(p["sites"]).set_index("site")["kept"] for i, p in enumerate(plans)}
    alike = pandas.DataFrame(kept).corr(method="spearman").to_numpy()
    pairs = [float(alike[i, j]) for i, j in itertools.combinations(kept, 2)]
    # If all sites keep the same share, as with uniform ranks, there is no order to agree on.
    return None if any(math.isnan(pair) for pair in pairs) else statistics.mean(pairs)
