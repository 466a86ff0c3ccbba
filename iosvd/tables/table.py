"""A table as values: columns, rows and cells, built from runs, records and published numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from iosvd.figures import DENSE
from iosvd.metric import AVERAGE, Metric, accuracy_on, other, perplexity_on
from iosvd.runs.config import PROTOCOL_LENGTH
from iosvd.runs.records import Record
from iosvd.runs.run import Run
from iosvd.tables.published import Library, Published, look_up
from iosvd.tables.spec import BY_TEXT, RowSpec, TableSpec

# The tasks of the papers' average (METHODS 9).
SEVEN_TASKS = frozenset(
    ["openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "mathqa"]
)
# Published metrics of another model than the table's, shown in columns of their own.
_REFERENCE_METRICS = (
    *map(perplexity_on, ("wikitext2", "ptb", "c4")),
    *map(accuracy_on, ("scienceqa", "seed_bench")),
    AVERAGE,
)


@dataclass(frozen=True)
class Found:
    """A run that a table expects, and its record if it is complete and of this protocol."""

    run: Run
    record: Record | None

    @property
    def ratio(self) -> float | None:
        """The run's ratio; with a target_kl, the ratio that was found, None before."""
        return (
            self.record.ratio
            if self.run.goal.ratio is None and self.record
            else self.run.goal.ratio
        )


@dataclass(frozen=True)
class Column:
    """One metric; `reference` columns hold published values only."""

    metric: Metric
    title: str
    digits: int
    better: int  # −1: lower is better, 1: higher, 0: no winner.
    reference: bool = False


@dataclass(frozen=True)
class Cell:
    """The measured value, the published value for the same thing, and the rank in its group."""

    measured: float | None = None
    spread: float | None = None  # Standard deviation, if it is a mean over runs.
    published: Published | None = None
    same_items: bool = True  # Whether both were measured on the same windows or items.
    place: int = 0  # 1: best of the group's rows, 2: second, 0: neither.

    @property
    def is_compared(self) -> bool:
        """Whether the difference between the two values means anything."""
        both = self.measured is not None and self.published is not None
        return both and self.same_items and self.published.is_exact  # type: ignore[union-attr]


@dataclass(frozen=True)
class Row:
    """One method, for one model at one ratio."""

    model: str
    ratio: float | None  # None: of a target_kl, not known yet.
    name: str
    label: str | None
    cells: tuple[Cell, ...]
    record: Record | None
    expected: bool  # Whether the sweep has such a run.


@dataclass(frozen=True)
class Table:
    """Columns and rows, by group in the order of the sweep."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def build_table(spec: TableSpec, found: Sequence[Found], library: Library) -> Table:
    """Arrange what was found in the order of the spec; runs it does not name follow.

    Args:
        spec: which rows, and which published tables.
        found: the sweep's runs, dense baselines included.
        library: all published numbers.
    """
    groups = _groups(found)
    columns = _columns(spec, found)
    rows = []
    for model, ratio in groups:
        mine = [f for f in found if (f.run.model.name, f.ratio) == (model, ratio)]
        made = [_row(row, model, ratio, mine, columns, spec, library) for row in _specs(spec, mine)]
        rows += _placed([row for row in made if _has_content(row)], columns)
    columns, kept = _without_empty_references(columns, rows)
    models = {model for model, _ in groups}
    title = f"{spec.title}; {models.pop()}" if len(models) == 1 else spec.title
    return Table(title, columns, kept)


def _groups(found: Sequence[Found]) -> list[tuple[str, float | None]]:
    """Models in the order of the sweep, and of each the ratios, falling: dense comes first."""
    models = list(dict.fromkeys(f.run.model.name for f in found))
    ratios = {model: {f.ratio for f in found if f.run.model.name == model} for model in models}

    def falling(ratio: float | None) -> float:
        return -ratio if ratio is not None else 0.0  # Unknown ratios come last.

    return [(model, ratio) for model in models for ratio in sorted(ratios[model], key=falling)]


def _specs(spec: TableSpec, found: Sequence[Found]) -> list[RowSpec]:
    named = {row.label for row in spec.rows}
    rest = dict.fromkeys(f.run.label for f in found if f.run.label not in named)
    return [*spec.rows, *(RowSpec(name=label, label=label) for label in rest)]


def _has_content(row: Row) -> bool:
    """Whether to show the row: the sweep has its run, or something was published for it."""
    return row.expected or any(cell.published is not None for cell in row.cells)


def _row(
    row: RowSpec,
    model: str,
    ratio: float | None,
    found: Sequence[Found],
    columns: Sequence[Column],
    spec: TableSpec,
    library: Library,
) -> Row:
    mine = next((f for f in found if f.run.label == row.label), None)
    record = mine.record if mine is not None else None

    def cell(column: Column) -> Cell:
        source = spec.model if column.reference else model
        published = (
            look_up(library, spec.published, row.published, source, ratio, column.metric.name)
            if source is not None
            else None
        )
        measured = None if column.reference or record is None else record.value(column.metric)
        spread = None if record is None else record.spread.get(column.metric)
        same = mine is not None and _same_items(mine.run, column.metric)
        return Cell(measured, spread, published, same)

    cells = tuple(cell(column) for column in columns)
    return Row(model, ratio, row.name, row.label, cells, record, mine is not None)


def _same_items(run: Run, metric: Metric) -> bool:
    """Whether a run measures a metric on all the windows or items of the papers."""
    if metric.is_perplexity:
        return run.eval.windows == 0 and run.eval.seq_len == PROTOCOL_LENGTH
    tasks = run.eval.zero_shot
    return tasks.limit == 0 and (metric != AVERAGE or set(tasks.tasks) == SEVEN_TASKS)


def _columns(spec: TableSpec, found: Sequence[Found]) -> tuple[Column, ...]:
    runs = [f.run for f in found]
    texts = dict.fromkeys(t.name for run in runs for t in run.eval.texts.values())
    tasks = dict.fromkeys(task for run in runs for task in run.eval.zero_shot.tasks)
    columns = [Column(perplexity_on(text), f"{text} ppl ↓", 2, -1) for text in texts]
    columns += [Column(accuracy_on(task), f"{task} ↑", 3, 1) for task in tasks]
    asked = dict.fromkeys(q.name for run in runs for q in run.eval.questions.values())
    for name in asked:
        columns.append(Column(accuracy_on(name), f"{name} ↑", 3, 1))
        columns.append(Column(accuracy_on(f"{name}_likeliest"), f"{name}, likeliest ↑", 3, 1))
        columns.append(Column(other(f"{name}_unanswered"), f"{name}, unanswered", 0, 0))
    if len(tasks) > 1:
        columns.append(Column(AVERAGE, "average ↑", 3, 1))
    for name in spec.extra:
        columns += _by_text(name, texts) if name in BY_TEXT else [_EXTRA[name]]
    if spec.model is not None and spec.model not in {run.model.name for run in runs}:
        columns += [_reference(metric, spec.model) for metric in _REFERENCE_METRICS]
    return tuple(columns)


_EXTRA = {
    "ratio_achieved": Column(other("ratio_achieved"), "achieved", 4, 0),
    "cache_ratio": Column(other("cache_ratio"), "R2, cache", 3, 0),
    "whole_ratio": Column(other("whole_ratio"), "whole model", 3, 0),
    "seconds": Column(other("seconds"), "seconds", 1, 0),
    "target_bytes": Column(other("target_bytes"), "bytes", 0, 0),
    "predicted_kl": Column(other("predicted_kl"), "predicted KL", 4, 0),
    "predicted_loss_change": Column(other("predicted_loss_change"), "predicted Δloss", 4, 0),
    "rank_agreement": Column(other("rank_agreement"), "rank agreement", 2, 0),
}
_BY_TEXT_TITLES = {
    "kl": "KL",
    "loss_change": "Δloss",
    "site_median": "sites: predicted / KL",
    "sites_within_two": "sites within ×2",
}


def _by_text(name: str, texts: Iterable[str]) -> list[Column]:
    digits = 4 if name in ("kl", "loss_change") else 2
    return [
        Column(other(f"{text}_{name}"), f"{text} {_BY_TEXT_TITLES[name]}", digits, 0)
        for text in texts
    ]


def _reference(metric: Metric, model: str) -> Column:
    name = "average" if metric == AVERAGE else metric.of
    shown = f"{name} ppl" if metric.is_perplexity else name
    return Column(metric, f"published, {model}: {shown}", 2, 0, reference=True)


def _without_empty_references(
    columns: tuple[Column, ...], rows: Sequence[Row]
) -> tuple[tuple[Column, ...], tuple[Row, ...]]:
    """Drop columns of published values that are empty."""
    full = [
        i
        for i, column in enumerate(columns)
        if not column.reference or any(row.cells[i].published is not None for row in rows)
    ]
    kept = tuple(replace(row, cells=tuple(row.cells[i] for i in full)) for row in rows)
    return tuple(columns[i] for i in full), kept


def _placed(rows: Sequence[Row], columns: Sequence[Column]) -> list[Row]:
    """Mark the best and the second measured value of each column among a group's methods."""
    places = [dict(_ranking(column, i, rows)) for i, column in enumerate(columns)]
    return [
        replace(
            row,
            cells=tuple(
                replace(cell, place=places[i].get(number, 0)) for i, cell in enumerate(row.cells)
            ),
        )
        for number, row in enumerate(rows)
    ]


def _ranking(column: Column, index: int, rows: Sequence[Row]) -> Iterable[tuple[int, int]]:
    """Yield (row, place) of those that are best or second; equals, as shown, share a place."""
    values = {
        number: round(measured, column.digits)
        for number, row in enumerate(rows)
        if row.label != DENSE and (measured := row.cells[index].measured) is not None
    }
    if column.better == 0 or len(values) < 2:
        return
    leaders = sorted(set(values.values()), reverse=column.better > 0)[:2]
    for number, value in values.items():
        if value in leaders:
            yield number, leaders.index(value) + 1
