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
from iosvd.plan import plan_frame
from iosvd.runs.config import label
from iosvd.runs.records import Record, read_plan, run_folder
from iosvd.tables.table import Found

RANK_AGREEMENT = "rank_agreement"


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

    def means(field: str) -> dict[str, float]:
        """Of what every run has."""
        values = [getattr(record, field) for record in records]
        common = [key for key in values[0] if all(key in v for v in values)]
        return {key: statistics.mean(v[key] for v in values) for key in common}

    merged = replace(
        first,
        perplexity=means("perplexity"),
        accuracy=means("accuracy"),
        extra=means("extra"),
        ratio_achieved=statistics.mean(record.ratio_achieved for record in records),
        target_bytes=round(statistics.mean(record.target_bytes for record in records)),
        seconds=statistics.mean(record.seconds for record in records),
        commit=", ".join(dict.fromkeys(record.commit for record in records)),
        average_acc=_mean_of([record.average_acc for record in records]),
    )
    if len(records) == 1:
        return merged
    metrics = [f"{name}_ppl" for name in first.perplexity]
    metrics += [*first.accuracy, *first.extra, "average_acc"]
    values = {m: [v for r in records if (v := r.value(m)) is not None] for m in metrics}
    spread = {m: statistics.stdev(v) for m, v in values.items() if len(v) == len(records)}
    agreement = _rank_agreement(found)
    more = {} if agreement is None else {RANK_AGREEMENT: agreement}
    return replace(merged, spread=spread, extra={**merged.extra, **more})


def _mean_of(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.mean(there) if len(there) == len(values) else None


def _rank_agreement(found: Sequence[Found]) -> float | None:
    """Mean Spearman correlation, over pairs of runs, of the shares that the sites keep."""
    try:
        plans: list[dict[str, Any]] = [read_plan(run_folder(one.run)) for one in found]
    except RecordError:
        return None
    kept = {i: plan_frame(p["sites"]).set_index("site")["kept"] for i, p in enumerate(plans)}
    alike = pandas.DataFrame(kept).corr(method="spearman").to_numpy()
    pairs = [float(alike[i, j]) for i, j in itertools.combinations(kept, 2)]
    # Where all sites keep the same, as with uniform ranks, there is no order to agree on.
    return None if any(math.isnan(pair) for pair in pairs) else statistics.mean(pairs)
