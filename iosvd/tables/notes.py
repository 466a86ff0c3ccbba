"""The notes below a table: its marks, its runs, and its deviations from the paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from iosvd.data.visual import VisualDataset
from iosvd.figures import DENSE
from iosvd.models.loading import Dtype
from iosvd.runs.records import Record
from iosvd.runs.run import KL, Run
from iosvd.tables.spec import TableSpec
from iosvd.tables.sweep import OnDisk, Sweep
from iosvd.tables.table import Table
from iosvd.tables.text import flags

# Options that change how a run is carried out or logged, not what it measures.
_NOT_SCIENTIFIC = ("runtime.", "wandb", "hydra", "experiment=")


def notes(table: Table, on_disk: OnDisk, spec: TableSpec, sweep: Sweep) -> list[str]:
    """Return the notes, one paragraph each.

    Args:
        table: as rendered.
        on_disk: the runs that were found, and those that were set aside.
        spec: its own notes, and those of its rows.
        sweep: its options are the deviations from the preset's protocol.
    """
    records = on_disk.records
    return [
        *filter(None, [_legend(table), _sources(table, spec)]),
        f"Runs found: {len(records)} of {len(sweep.runs)}{_kept(on_disk)}."
        f"{_provenance(records)}{_flags(table)}",
        *(f"Set aside: {reason}" for reason in on_disk.set_aside),
        _protocol(sweep.runs),
        *filter(None, [_bytes(spec, sweep.runs), _spread(spec), _columns(spec)]),
        _deviations(sweep.overrides),
        *spec.notes,
        *(f"{row.name}: {row.note}" for row in spec.rows if row.note),
        f"Command: `{sweep.command}`",
    ]


def _legend(table: Table) -> str:
    return (
        "`ratio` is the maintenance ratio: bits kept / 16 bits for every parameter of the target"
        " layers; without quantisation, parameters kept / parameters."
        + (
            " Where a method has cache_tokens, entries of a cache of so many tokens count too."
            if any("cache_tokens" in row.name for row in table.rows)
            else ""
        )
        + " Best of each ratio's methods in bold, second underlined; – is a gap."
        + (
            " In brackets the published value and the difference to it."
            if any(
                cell.published is not None and not column.reference
                for row in table.rows
                for cell, column in zip(row.cells, table.columns, strict=True)
            )
            else ""
        )
    )


def _sources(table: Table, spec: TableSpec) -> str:
    published = [cell.published for row in table.rows for cell in row.cells if cell.published]
    if not published:
        return ""
    used = {(value.source, value.table) for value in published}
    named = [f"{t.source} {t.table}" for t in spec.published if (t.source, t.table) in used]
    marks = {value.confidence for value in published}
    meaning = {
        "secondary": "s: second-hand, quoted by others",
        "derived": "d: derived",
        "primary": "no mark: read in the paper",
    }
    legend = "; ".join(text for mark, text in meaning.items() if mark in marks)
    return f"Published values: {', else '.join(named)} ({legend}; the csv names each one's source)."


def _kept(on_disk: OnDisk) -> str:
    return f", {on_disk.kept} of them kept in `results/records`" if on_disk.kept else ""


def _provenance(records: Sequence[Record]) -> str:
    if not records:
        return ""
    days = sorted(record.started[:10] for record in records)
    span = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    files = _listed(record.model_file for record in records if record.model_file)
    revisions = _listed(record.model_revision for record in records if record.model_revision)
    return (
        f" Measured {span} on {_listed(record.device for record in records)},"
        f" commit {_listed(record.commit for record in records)}"
        + (f"; model revision {revisions}" if revisions else "")
        + (f"; model file {files}" if files else "")
        + "."
    )


def _flags(table: Table) -> str:
    marked = ", ".join(f"{letter}: commit {commit}" for commit, letter in flags(table).items())
    return f" Rows measured by another commit than most are marked: {marked}." if marked else ""


def _protocol(runs: Sequence[Run]) -> str:
    """Describe model and protocol of the runs (METHODS 9 asks for id and joins)."""
    run = runs[0]
    evaluation, model = run.eval, run.model
    # The dense model's calibration is not used.
    used = [r for r in runs if r.label != DENSE] or [run]
    windows, lengths, seeds, sources = (
        _listed(str(value(r)) for r in used)
        for value in (
            lambda r: r.data.calibration.windows,
            lambda r: r.data.calibration.seq_len,
            lambda r: r.data.calibration.seed,
            lambda r: r.data.dataset.name,
        )
    )
    source = model.path or (f"embedded {model.name}" if model.embedded else model.hub_id)
    joins = [
        f"{text.name}, every document a sequence"
        if text.document_windows
        else f"{text.name} joined by {text.join!r}"
        for text in evaluation.texts.values()
    ]
    parts = [
        f"Model {source}, {model.dtype.value}",
        f"calibration {windows} questions of {sources}, seed {seeds}"
        if any(isinstance(r.data.dataset, VisualDataset) for r in used)
        else f"calibration {windows} × {lengths} tokens of {sources}, seed {seeds}",
    ]
    if joins:
        parts.append(f"perplexity in windows of {evaluation.seq_len} tokens ({', '.join(joins)})")
    if evaluation.questions:
        parts.append(
            "accuracy of generated answers (16 tokens, greedy; one that names no choice is wrong)"
            " and of the likeliest choice"
        )
    if evaluation.zero_shot.tasks:
        parts.append("zero-shot accuracy `acc` with lm-eval's prompts")
    if evaluation.kl is not KL.none:
        first = f"the first {evaluation.kl_windows}" if evaluation.kl_windows else "all"
        parts.append(f"divergences on {first} windows")
    return f"{'; '.join(parts)}."


def _bytes(spec: TableSpec, runs: Sequence[Run]) -> str:
    """Explain the column of bytes if it counts other than the ratio does."""
    wide = any(run.model.dtype is Dtype.float32 for run in runs)
    if "target_bytes" not in spec.extra or not wide:
        return ""
    return (
        "Bytes are those stored: without quantisation an entry takes four in float32, where the"
        " ratio counts two."
    )


def _spread(spec: TableSpec) -> str:
    if spec.spread is None:
        return ""
    return (
        f"Mean ± standard deviation over {spec.spread}. Rank agreement: Spearman correlation of the"
        " shares that the sites keep, mean over pairs of runs."
    )


_MEANINGS = {
    "predicted_kl": "predicted KL: ½ Σ σ² of dropped components, nats per token, a top-K metric's"
    " share of them",
    "cache_ratio": "R2: entries of keys and values (or of their latents) kept in the cache",
    "whole_ratio": "whole model: bits of all its parameters kept",
    "predicted_loss_change": "predicted Δloss: −Σ g σ of dropped components, nats per token, on"
    " calibration windows",
    "kl": "KL: exact KL(dense ‖ compressed) on held-out text, nats per token",
    "loss_change": "Δloss: measured change of the next-token loss on held-out text, nats per token",
    "site_median": "sites: of one site truncated at a time, the median of predicted / exact KL",
    "sites_within_two": "sites within ×2: share of the sites predicted within a factor of two",
}


def _columns(spec: TableSpec) -> str:
    named = [_MEANINGS[name] for name in spec.extra if name in _MEANINGS]
    return f"{'; '.join(named)}." if named else ""


def _deviations(overrides: Sequence[str]) -> str:
    changed = [o for o in overrides if not o.lstrip("+~").startswith(_NOT_SCIENTIFIC)]
    if not changed:
        return "Protocol: the preset's."
    return f"Departs from the preset's protocol: {', '.join(f'`{o}`' for o in changed)}."


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
