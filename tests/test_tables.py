"""Tables are pure: from runs, records and published numbers to text that says what it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import shared

from iosvd.errors import ConfigError, RecordError
from iosvd.metric import AVERAGE, accuracy_on, perplexity_on
from iosvd.presets import conf_folder
from iosvd.runs.config import compose_run
from iosvd.runs.records import Record
from iosvd.sweeps.expansion import baselines, expand
from iosvd.tables.comparison import compare_with_published, compare_with_table, outside
from iosvd.tables.frame import to_frame
from iosvd.tables.latex import to_latex
from iosvd.tables.markdown import to_markdown
from iosvd.tables.notes import notes
from iosvd.tables.published import PUBLISHED, Published, look_up, read_published
from iosvd.tables.spec import PublishedTable, RowSpec, TableSpec, Tolerance, table_spec
from iosvd.tables.sweep import OnDisk, Sweep
from iosvd.tables.table import Found, Table, build_table

TABLES = sorted(path.stem for path in (conf_folder() / "table").glob("*.yaml"))
SPEC = TableSpec(
    title="A table",
    model="llama_7b",
    rows=[
        RowSpec("Dense", "dense", ["dense"]),
        RowSpec("SVD_1", "svd"),
        RowSpec("IO|SVD", "io_svd", ["IO-SVD"], note="a note"),
        RowSpec("To come", "to_come", ["IO-SVD+"]),
        RowSpec("Never published", "never"),
    ],
    published=[PublishedTable("paper", "T1"), PublishedTable("other", "T2")],
    notes=["One more note."],
)


def published(value: str, confidence: str, source: str = "paper", table: str = "T1") -> Published:
    return Published(value, confidence, source, table)


PPL = perplexity_on("pydoc")
LIBRARY = {
    ("paper", "T1", "llama_7b", 1.0, "dense", "wikitext2_ppl"): published("5.68", "primary"),
    ("paper", "T1", "llama_7b", 0.8, "IO-SVD", "wikitext2_ppl"): published("6.41", "secondary"),
    ("other", "T2", "llama_7b", 0.8, "IO-SVD", "wikitext2_ppl"): published(
        "9.0", "primary", "other"
    ),
    ("other", "T2", "llama_7b", 0.8, "IO-SVD+", "wikitext2_ppl"): published(
        "5.59", "derived", "other", "T2"
    ),
    ("paper", "T1", "llama_7b", 0.8, "IO-SVD", "average_acc"): published("0.5", "secondary"),
}
RECORD = Record(
    digest="d",
    label="",
    ratio=0.8,
    ratio_achieved=0.7999,
    target_bytes=1000,
    values={},
    spread={},
    seconds=12.34,
    started="2026-11-22T20:00:00+00:00",
    device="cpu",
    model_revision=None,
    model_file=None,
    commit="abc",
)


def found(model: str, method: str, ratio: float, ppl: float | None, **changes: object) -> Found:
    """A run of the model with `ppl` on its text and accuracies around a hundredth of it."""
    setting = ["dataset=wikitext2", "eval=paper"] if model != "tiny" else ["eval=pydoc"]
    run = compose_run([f"model={model}", f"method={method}", f"ratio={ratio}", *setting])
    if ppl is None:
        return Found(run, None)
    texts = [text.name for text in run.eval.texts.values()]
    tasks = run.eval.zero_shot.tasks
    record = replace(
        RECORD,
        label=method,
        ratio=ratio,
        values={
            **dict.fromkeys(map(perplexity_on, texts), ppl),
            **dict.fromkeys([*map(accuracy_on, tasks), AVERAGE], 1 / ppl),
        },
    )
    return Found(run, replace(record, **changes))  # type: ignore[arg-type]


def small(model: str) -> list[Found]:
    return [
        found(model, "dense", 1, 5.0),
        found(model, "svd", 0.8, 1234.5),
        found(model, "io_svd", 0.8, 6.5, commit="def"),
        found(model, "svd_llm", 0.8, 8.0, commit="abc"),
        found(model, "svd", 0.6, None),
    ]


@pytest.fixture(scope="module")
def tiny() -> Table:
    return build_table(SPEC, small("tiny"), LIBRARY)


GOLDEN_MARKDOWN = """\
# A table; tiny

|   ratio | method             |   pydoc ppl ↓ |   pydoc_continuation ↑ |   published, llama_7b: \
wikitext2 ppl |   published, llama_7b: average |
|--------:|:-------------------|--------------:|-----------------------:|---------------------\
----------------:|-------------------------------:|
|       1 | Dense              |          5.00 |                  0.200 |                     \
            5.68 |                              – |
|     0.8 | SVD_1              |      1,234.50 |                  0.001 |                     \
               – |                              – |
|     0.8 | IO\\|SVD<sup>a</sup> |      **6.50** |              **0.154** |                     \
6.41<sup>s</sup> |               0.5<sup>s</sup> |
|     0.8 | To come            |             – |                      – |                     \
5.59<sup>d</sup> |                              – |
|     0.8 | svd_llm            |   <u>8.00</u> |           <u>0.125</u> |                     \
               – |                              – |
|     0.6 | SVD_1              |             – |                      – |                     \
               – |                              – |

First.

Second.
"""


def squeezed(text: str) -> list[str]:
    """Lines without the padding of the columns, whose width is the library's affair."""
    return [" ".join(line.replace("-", " ").replace(":", " ").split()) for line in text.split("\n")]


def test_markdown_is_the_expected_text(tiny: Table) -> None:
    """Order, gaps, rows to come, best and second, published values, the flag of another commit."""
    assert squeezed(to_markdown(tiny, ["First.", "Second."])) == squeezed(GOLDEN_MARKDOWN)


GOLDEN_LATEX = r"""
\begin{tabular}{llrrrr}
\toprule
ratio & method & pydoc ppl $\downarrow$ & pydoc\_continuation $\uparrow$ & published, llama\_7b: wikitext2 ppl & published, llama\_7b: average \\
\midrule
1 & Dense & 5.00 & 0.200 & 5.68 & -- \\
\midrule
0.8 & SVD\_1 & 1,234.50 & 0.001 & -- & -- \\
0.8 & IO\textbar{}SVD\textsuperscript{a} & \textbf{6.50} & \textbf{0.154} & 6.41\textsuperscript{s} & 0.5\textsuperscript{s} \\
0.8 & To come & -- & -- & 5.59\textsuperscript{d} & -- \\
0.8 & svd\_llm & \underline{8.00} & \underline{0.125} & -- & -- \\
\midrule
0.6 & SVD\_1 & -- & -- & -- & -- \\
\bottomrule
\end{tabular}
% First.
"""  # noqa: E501


def test_latex_is_the_expected_text(tiny: Table) -> None:
    assert to_latex(tiny, ["First."]) == GOLDEN_LATEX.lstrip()


def test_the_frame_is_unrounded_and_names_every_source(tiny: Table) -> None:
    frame = to_frame(tiny).set_index(["ratio", "method"])
    row = frame.loc[(0.8, "IO|SVD")]
    assert (row["label"], row["pydoc_ppl"], row["commit"]) == ("io_svd", 6.5, "def")
    assert row["wikitext2_ppl_published"] == "6.41"
    assert row["wikitext2_ppl_published_source"] == "paper, T1"
    assert row["wikitext2_ppl_published_confidence"] == "secondary"
    assert pandas.isna(frame.loc[(0.6, "SVD_1"), "pydoc_ppl"])


def test_the_published_model_has_the_value_and_the_difference_in_each_cell() -> None:
    text = to_markdown(build_table(SPEC, small("llama_7b"), LIBRARY), [])
    assert "published" not in text.splitlines()[2]
    assert "**6.50** [6.41<sup>s</sup>, +0.09]" in text
    assert "5.00 [5.68, −0.68]" in text
    assert "**0.154** [0.5<sup>s</sup>, −0.346]" in text
    assert "– [5.59<sup>d</sup>]" in text


@pytest.mark.parametrize(
    ("option", "metric"),
    [
        ("eval.zero_shot.tasks=[piqa,mathqa]", "average_acc"),
        ("eval.zero_shot.limit=9", "average_acc"),
        ("eval.windows=9", "wikitext2_ppl"),
        ("eval.seq_len=512", "wikitext2_ppl"),
    ],
)
def test_no_difference_to_what_was_measured_on_other_items(option: str, metric: str) -> None:
    whole = small("llama_7b")[2]
    config = ["model=llama_7b", "dataset=wikitext2", "eval=paper", "method=io_svd", "ratio=0.8"]
    part = Found(compose_run([*config, option]), whole.record)
    cells = {}
    for name, run in (("whole", whole), ("part", part)):
        table = build_table(SPEC, [run], LIBRARY)
        at = [column.metric.name for column in table.columns].index(metric)
        cells[name] = next(row.cells[at] for row in table.rows if row.label == "io_svd")
        assert cells[name].published is not None
    assert cells["whole"].is_compared and not cells["part"].is_compared
    rounded = replace(cells["whole"], published=published("6e0", "primary"))
    assert not rounded.is_compared  # Its digits are not all there.


def test_models_of_a_sweep_are_groups_of_their_own() -> None:
    both = build_table(SPEC, [*small("tiny"), *small("llama_7b")], LIBRARY)
    lines = to_markdown(both, []).splitlines()
    assert lines[0] == "# A table"
    assert lines[2].startswith("| model")
    assert [row.model for row in both.rows].count("tiny") == 5  # No gap to come: none published.


def sweep(overrides: Sequence[str] = ("model=tiny",)) -> Sweep:
    runs = tuple(f.run for f in small("tiny"))
    return Sweep("main", tuple(overrides), runs)


def test_notes_say_what_was_found_what_departs_and_what_was_set_aside(tiny: Table) -> None:
    on_disk = OnDisk(tuple(small("tiny")), ("metrics.json is damaged",))
    text = "\n".join(notes(tiny, on_disk, SPEC, sweep(["model=tiny", "wandb=offline"])))
    assert "Runs found: 4 of 5. Measured 2026-11-22 on cpu, commit abc, def." in text
    assert "marked: a: commit def." in text
    assert "Set aside: metrics.json is damaged" in text
    assert "Departs from the preset's protocol: `model=tiny`." in text
    assert "Published values: paper T1, else other T2 (s: second-hand" in text
    assert "One more note." in text and "IO|SVD: a note" in text
    assert "Command: `make table-main ARGS='model=tiny wandb=offline'`" in text
    assert "Model embedded tiny, float32; calibration 256 × 256 tokens of pydoc, seed 0" in text
    assert r"windows of 256 tokens (pydoc joined by '\n\n')" in text
    empty = OnDisk(tuple(Found(run, None) for run in sweep().runs), ())
    nothing = build_table(SPEC, empty.found, {})
    text = "\n".join(notes(nothing, empty, SPEC, sweep([])))
    assert "Runs found: 0 of 5." in text and "Published values" not in text
    assert "Protocol: the preset's." in text and "Command: `make table-main`" in text


def test_equal_values_as_shown_share_a_place() -> None:
    runs = [found("tiny", m, 0.8, p) for m, p in (("svd", 2.001), ("asvd", 2.0), ("io_svd", 3))]
    places = [row.cells[0].place for row in build_table(TableSpec("t"), runs, {}).rows]
    assert places == [1, 1, 2]
    single = build_table(TableSpec("t"), runs[:1], {})
    assert single.rows[0].cells[0].place == 0  # Nothing to compare it with.


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_experiment_and_its_rows_are_known(name: str) -> None:
    """Every label is a run of the sweep or a method to come; every published name is in the csv."""
    spec, library = table_spec(name), read_published()
    overrides = [f"experiment={name}"]
    cells = expand(overrides, sweep=True)
    assert len({(run.model.name, run.label, run.goal.ratio) for run in cells}) == len(cells) > 1
    assert cells[0].runtime.tracking.group == name
    runs = baselines(overrides) + cells
    labels = {run.label for run in runs}
    only_dense = len(spec.rows) == 1  # Its rows are named after their options.
    assert labels <= {row.label for row in spec.rows} or only_dense
    assert len({row.name for row in spec.rows}) == len(spec.rows)
    sources = {(t.source, t.table) for t in spec.published}
    names = {key[4] for key in library if key[:2] in sources}
    for row in spec.rows:
        assert set(row.published) <= names, row.name
    if spec.model is not None:
        # Ours are of the embedded model unless another is asked for.
        assert {run.model.name for run in runs} & {spec.model, "tiny"}
    for label, ratio in spec.shown_run.items():
        assert any((run.label, run.goal.ratio) == (label, ratio) for run in runs)


def test_every_experiment_has_its_table() -> None:
    assert {path.stem for path in (conf_folder() / "experiment").glob("*.yaml")} == set(TABLES)


def test_an_unknown_table_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"there is no table mian; tables: .*topk, .*main"):
        table_spec("mian")


def stated_in_methods(source: str) -> set[str]:
    """The numbers in the sections of METHODS.md that name a paper."""
    sections = re.split(r"^##+ ", shared("METHODS.md").read_text(), flags=re.MULTILINE)
    named = [text for text in sections if source.split()[-1] in text or "LEMS" in text[:20]]
    return set(re.findall(r"\d+\.\d+", " ".join(named)))


def as_printed(row: Any) -> list[tuple[str, str, str, str]]:
    """Return how a share of answers and a ratio may stand in papers about images: in percent."""
    share, value = float(row.ratio), f"{100 * float(row.value):.2f}".rstrip("0").rstrip(".")
    cache = {0.9: ("42.5", "33.75"), 0.8: ("35", "30"), 0.7: ("27.5", "26.25")}.get(share, ())
    ratios = ["1.0"] if share == 1 else [f"R1 {100 * share:g}/R2 {part}" for part in cache]
    if share == 0.5:
        ratios = ["unknown (summary says 0.5)"]
    return [(ratio, f"{row.metric}_img_acc", value, row.confidence) for ratio in ratios]


def test_published_numbers_are_those_of_the_reference_file() -> None:
    """Every fact that is rendered, with its confidence, against the file it was copied from."""
    reference = pandas.read_csv(shared("reference", "paper_tables.csv"), dtype=str)
    facts = {
        (
            *(r.source.split(" Table")[0], str(r.table).split(" (")[0], r.model),
            *(r.method, r.ratio, r.metric, r.value, r.confidence),
        )
        for r in reference.itertuples()
    }
    ours = pandas.read_csv(PUBLISHED, dtype=str)
    assert len(ours) > 300
    for row in ours.itertuples():
        ratio = "1.0" if row.ratio == "1" else row.ratio
        key = (row.source, row.table, row.model, row.method, ratio)
        stated = row.table == "text" and row.value in stated_in_methods(str(row.source))
        if row.preset == "smolvlm_2b":
            stated = any((*key[:4], *fact) in facts for fact in as_printed(row))
        assert stated or (*key, row.metric, row.value, row.confidence) in facts, key
    presets = dict(zip(ours["preset"], ours["model"], strict=True))
    assert len(ours[["preset", "model"]].drop_duplicates()) == len(presets) == 10
    assert presets["llama_7b"] == "LLaMA-7B" and presets["llama2_7b"] == "LLaMA-2-7B"
    keys = ["source", "table", "preset", "method", "ratio", "metric"]
    assert not ours.duplicated(keys).any()
    assert set(ours["confidence"]) <= {"primary", "secondary", "derived"}


@pytest.mark.parametrize(
    ("table", "model", "ratio", "label", "metric", "expected"),
    [
        ("main", "llama_7b", 0.8, "io_svd", "wikitext2_ppl", "6.41"),
        ("main", "llama_7b", 0.4, "svd_llm", "wikitext2_ppl", "53.74"),
        ("main", "llama_7b", 0.8, "svd", "wikitext2_ppl", "20061"),
        ("main", "llama_7b", 0.8, "asvd", "piqa", "0.68"),
        ("families", "llama_13b", 0.8, "svd_llm", "wikitext2_ppl", "6.61"),
        ("families", "llama_13b", 0.8, "svd_llm_lora", "wikitext2_ppl", "6.43"),
        ("families", "llama_30b", 0.8, "asvd", "wikitext2_ppl", "22.71"),
        ("remapping", "llama_7b", 0.6, "io_svd_plus", "wikitext2_ppl", "6.27"),
        ("zs_svd_main", "llama_7b", 0.7, "svd_llm", "ptb_ppl", "29.0"),
    ],
)
def test_rows_have_their_own_published_value(
    table: str, model: str, ratio: float, label: str, metric: str, expected: str
) -> None:
    """Read by a person in the reference file, against what the preset's row finds."""
    spec, library = table_spec(table), read_published()
    (row,) = [row for row in spec.rows if row.label == label]
    value = look_up(library, spec.published, row.published, model, ratio, metric)
    assert value is not None and value.text == expected


def test_a_missing_reference_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cannot read .*gone\.csv.*restore it"):
        read_published(tmp_path / "gone.csv")


def test_cells_outside_the_tolerance_are_named() -> None:
    table = build_table(SPEC, small("llama_7b"), LIBRARY)
    compared = compare_with_published(table, Tolerance(perplexity=0.02, accuracy=0.01))
    assert len(compared) == 3
    assert [str(c) for c in outside(compared)] == [
        "llama_7b, ratio 1, Dense, wikitext2_ppl: 5, reference 5.68 (-0.68)",
        "llama_7b, ratio 0.8, IO|SVD, average_acc: 0.153846, reference 0.5 (-0.346)",
    ]
    assert not outside(compare_with_published(table, Tolerance(perplexity=0.2, accuracy=0.4)))


def test_an_earlier_table_is_a_reference_too(tmp_path: Path) -> None:
    table = build_table(SPEC, small("tiny"), LIBRARY)
    path = tmp_path / "earlier.csv"
    to_frame(table).to_csv(path, index=False)
    same = compare_with_table(table, path, Tolerance(0, 0))
    assert len(same) == 8 and not outside(same)  # Four records, perplexity and accuracy.
    later = [
        replace(f, record=replace(f.record, values=f.record.values | {PPL: 7.0}))
        if f.record and f.run.label == "io_svd"
        else f
        for f in small("tiny")
    ]
    changed = compare_with_table(build_table(SPEC, later, LIBRARY), path, Tolerance(0.05, 0))
    assert [c.where for c in outside(changed)] == ["tiny, ratio 0.8, IO|SVD, pydoc_ppl"]
    fewer = build_table(SPEC, [f for f in small("tiny") if f.run.label != "svd_llm"], LIBRARY)
    assert not compare_with_table(fewer, path, Tolerance(0, 0))[6:]
    gone = [Found(f.run, None) if f.run.label == "svd_llm" else f for f in small("tiny")]
    missing = compare_with_table(build_table(SPEC, gone, LIBRARY), path, Tolerance(0, 0))
    assert [str(c) for c in outside(missing)] == [
        "tiny, ratio 0.8, svd_llm, pydoc_ppl: missing, reference 8",
        "tiny, ratio 0.8, svd_llm, pydoc_continuation: missing, reference 0.125",
    ]
    path.write_text("no,table\n1,2\n")
    with pytest.raises(RecordError, match="give a rendered table's csv"):
        compare_with_table(table, path, Tolerance())


def test_nothing_that_a_run_says_escapes_its_markup(tiny: Table) -> None:
    evil = "x\n\\input{/etc/passwd}\x1b[31m <script> | y"
    row = replace(tiny.rows[0], name=evil)
    table = replace(tiny, title=evil, rows=(row, *tiny.rows[1:]))
    latex = to_latex(table, [evil])
    assert [line for line in latex.splitlines() if line.startswith("\\input")] == []
    assert latex.splitlines()[-1].startswith("% x \\input")
    markdown = to_markdown(table, [evil])
    assert "<script>" not in markdown and "\x1b" not in latex + markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
