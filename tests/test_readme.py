"""What the README shows works, and its tree names what there is."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pandas
import pytest
import torch
from conftest import build, random_statistics
from transformers import AutoModelForCausalLM

from iosvd.factorization import Factorization
from iosvd.layers.replacement import low_rank_layers
from iosvd.method import Method
from iosvd.models.loading import ASSETS
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import compress
from iosvd.quantization import Half
from iosvd.runs.composition import compose
from iosvd.runs.config import to_run
from iosvd.whitening import Identity

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def rows_of(text: str) -> list[list[str]]:
    """The cells of every table row, without markup."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "--" not in line]
    marks = r"</?u>|[*`]|<sup>[a-d]</sup>"  # Places, and rows of another commit.
    return [[re.sub(marks, "", c).strip() for c in x.strip("|").split("|")] for x in lines]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model, and windows that fit it."""
    model = build("llama")
    model.resize_token_embeddings(1024)
    model.save_pretrained(tmp_path / "FOLDER")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "FOLDER" / name).write_bytes((ASSETS / "tiny" / name).read_bytes())
    (tmp_path / "TEXTS").mkdir()
    (tmp_path / "TEXTS" / "train.txt").write_text("Some text that is long enough.\n" * 400)
    (example,) = examples(README)
    shorter = example.replace("length=2048", "length=16")
    assert shorter != example
    monkeypatch.chdir(tmp_path)
    exec(shorter, {})
    assert (tmp_path / "COMPRESSED" / "plan.json").exists()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "DENSE")
    assert dense.num_parameters() == model.num_parameters()


def test_every_folder_and_every_file_beside_them_is_named() -> None:
    for path in (ROOT / "iosvd").glob("*.py"):
        assert path.name == "__init__.py" or path.name in page("code"), path
    for folder in (ROOT / "iosvd").iterdir():
        if folder.is_dir() and folder.name not in ("__pycache__", "conf"):
            assert f"`{folder.name}/`" in page("code"), folder
            assert folder.name == "assets" or f"{folder.name}/" in README, folder
    for folder in (ROOT / "conf").iterdir():
        assert folder.is_file() or f"{folder.name}/" in README, folder
    for name in re.findall(r"`(\w+\.py)`", page("code")):
        assert list((ROOT / "iosvd").rglob(name)) or (ROOT / "tests" / name).exists(), name


def test_the_table_of_corrections_is_the_measured_one() -> None:
    """Every number of it, against the rendered tables beside it."""
    columns = [
        ("tiny", "pydoc"),
        ("babyllama-1.0M-tok361", "tinystories"),
        *(("books-6M", text) for text in ("wikitext2", "ptb", "c4")),
    ]
    rows = re.findall(r"^\| (dense|0\.\d `\w+`) \|(.*)\|$", page("beyond"), flags=re.MULTILINE)
    rows = [(name, cells.split("|")) for name, cells in rows if cells.count("|") == 4]
    assert len(rows) == 18
    for model, text in columns:
        file = ROOT / "results" / "tables" / f"beyond-{model}.csv"
        measured = pandas.read_csv(file).set_index(["label", "ratio"])[f"{text}_ppl"]
        for name, cells in rows:
            ratio, _, label = name.replace("`", "").rpartition(" ")
            expected = measured[label, float(ratio or 1)]
            assert cells[columns.index((model, text))].strip() == f"{expected:.2f}", (name, model)


def test_the_ladder_is_the_measured_one() -> None:
    table = ROOT / "results" / "tables" / "beyond-babyllama-1.0M-tok361.csv"
    measured = pandas.read_csv(table).set_index(["label", "ratio"])["tinystories_ppl"]
    loss = numpy.log(measured / measured["dense", 1.0])
    section = page("beyond").partition("## The ladder")[2].partition("\n## ")[0]
    head, *rows = rows_of(section)
    assert len(rows) == 9
    ratios = [float(ratio) for ratio in head[1:5]]
    for label, *found, removed in rows:
        assert found == [f"{measured[label, ratio]:.2f}" for ratio in ratios], label
        shares = (round(100 * (1 - loss[label, r] / loss["io_svd", r])) for r in ratios[1:])
        assert removed == ", ".join(map(str, shares)) + " %", label
    sixteen_bit = measured[~measured.index.get_level_values("label").str.endswith("_plus")]
    for ratio in (0.6, 0.4, 0.3):
        assert sixteen_bit.xs(ratio, level="ratio").idxmin() == "io_svd_full"


def test_the_speed_of_generation_is_the_measured_one() -> None:
    tables = {
        ratio: pandas.read_csv(
            ROOT / "results" / "tables" / f"inference-smollm2_135m-{ratio}-cpu.csv"
        ).set_index(["batch", "model"])
        for ratio in ("0.4", "0.6")
    }
    rows = rows_of(page("inference"))[1:]
    assert len(rows) == 24
    for ratio, batch, model, *cells in rows:
        row = tables[ratio].loc[(int(batch), model)]
        names = ("decode / dense", "decode / limit", "peak / dense")
        assert cells == [*(f"{row[name]:.2f}" for name in names), f"{row['cache MiB']:.1f}"]
    dense, v, kv = (
        tables["0.4"].loc[(16, n), "cache MiB"] for n in ("dense", "+ V latent", "+ KV latent")
    )
    assert (
        f"{2 * v / dense - 1:.2f} of the entries of V and {1 + 2 * (kv - v) / dense:.2f} of"
        in page("inference")
    )


def test_the_losses_of_blocks_are_the_measured_ones() -> None:
    """The ranges and rank correlations of docs/beyond.md, against the rendered pages."""
    said = page("beyond").partition("## Is the loss of a block")[2].replace("−", "-")
    known = set()
    for model in ("babyllama-1.0M-tok361", "tiny"):
        text = (ROOT / "results" / "tables" / f"block_loss-{model}.md").read_text()
        lines = [line for line in text.splitlines() if line.startswith("Ratio ")]
        assert len(lines) == 3
        known |= {number for line in lines for number in re.findall(r"-?\d+\.\d\d", line)}
    numbers = re.findall(r"(?<![\d.])-?\d\.\d\d(?![\d.])", said)
    assert len(numbers) > 15
    assert set(numbers) <= known


def test_a_whitening_is_added_by_one_file_and_one_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/extending.md shows it, with the imports that its file would have."""
    (example,) = [code for code in examples(page("extending")) if "class Rms" in code]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    target = re.search(r"_target_: (iosvd\.whitening\.rms\.Rms)", page("extending"))
    assert target is not None
    module = ModuleType("iosvd.whitening.rms")
    imports = "from dataclasses import dataclass\n" + "".join(
        f"from iosvd.{package} import {names}\n"
        for package, names in (
            ("statistics.needs", "Needs, SiteStatistics"),
            ("types", "Whitener"),
            ("linalg", "DiagonalRoot, IdentityRoot"),
            ("whitening", "Whitening"),
        )
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(imports + example, module.__dict__)
    composed = compose(["method=svd_llm"])
    composed.whitening = {"_target_": target[1]}
    run = to_run(composed, "rms")
    weight, statistics = random_statistics(12, 20)
    assert statistics.input_metric is not None
    spectrum = Factorization()(weight, run.method.whitening(statistics), "site")
    scale = statistics.input_metric.diagonal().sqrt()
    torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(weight * scale))


def test_every_section_that_is_cited_is_there() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    sections = set(re.findall(r"^#+ ([0-9.]+?)\.? ", page, flags=re.MULTILINE))
    places = ("iosvd", "experiments", "benchmarks", "conf", "tests")
    files = [p for name in places for s in ("py", "yaml") for p in (ROOT / name).rglob(f"*.{s}")]
    cited = {m for p in files for m in re.findall(r"METHODS ([0-9]+(?:\.[0-9]+)?)", p.read_text())}
    assert len(cited) >= 10 and cited <= sections


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert links or path.name != "README.md"
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_the_readme_is_one_that_is_read_whole() -> None:
    assert len(README.splitlines()) <= 170
    assert all(path.name in README for path in DOCS)
    presets = [path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")]
    assert f"all {len(presets)} with" in README and f"{len(presets)} method presets" in README
    family = re.compile(r"^io_svd_(k|k_all|k[0-9]+|uniform|zero_sum|renormalized|exact|not_qk)$")
    for name in presets:
        assert f"`{name}`" in page("presets") or family.match(name) or name.endswith(("_5", "_10"))


def test_every_command_has_its_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, flags=re.MULTILINE))
    targets |= {f"table-{path.stem}" for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    kinds = ("render-", "keep-")
    targets |= {name.replace("table-", kind) for name in targets for kind in kinds}
    for path in (ROOT / "README.md", *DOCS):
        text = path.read_text()
        code = re.findall(r"`([^`]+)`", text) + re.findall(r"^make .*$", text, flags=re.MULTILINE)
        for command in (line for line in code if line.startswith("make ")):
            assert command.split()[1] in targets, (path.name, command)


def test_the_language_model_is_the_rendered_table() -> None:
    rendered = rows_of((ROOT / "results" / "tables" / "main-smollm2_135m.md").read_text())
    shown = [row for row in rows_of(README) if len(row) == 5]
    measured = [row[:5] for row in rendered if row[2] != "–" and row[0] != "0.6"]
    assert len(shown) == 14 and shown == measured
    seeds = ROOT / "results" / "tables" / "smollm2_seeds-smollm2_135m.md"
    means = {
        row[1]: [cell.split(" ± ")[0] for cell in row[2:5]] for row in rows_of(seeds.read_text())
    }
    logs = {
        name: numpy.log([float(mean) for mean in means[name]])
        for name in ("dense", "io_svd", "svd_llm")
    }
    shares = (logs["io_svd"] - logs["dense"]) / (logs["svd_llm"] - logs["dense"])
    damage = [f"{100 * share:.0f}" for share in sorted(shares)]
    assert f"{damage[0]} to {damage[-1]} %" in README
    wikitext2 = {row[1]: row[2] for row in rows_of(seeds.read_text())}
    assert f"WikiText-2: {wikitext2['io_svd']} against {wikitext2['svd_llm']}" in README


def test_the_page_of_the_language_model_is_of_rendered_tables() -> None:
    shown, tables = page("smollm2"), ROOT / "results" / "tables"
    topk = (tables / "smollm2_topk-smollm2_135m.md").read_text()
    tasks = rows_of((tables / "smollm2_tasks-smollm2_135m.md").read_text())
    stabilised = rows_of((tables / "ablation_metric-smollm2_135m.md").read_text())
    apart = ("Dense", "KFAC-SVD, uniform ranks")
    stabilisers = [row for row in stabilised if row[1] not in apart]
    accuracies = [[*row[:2], *row[5:10]] for row in tasks]
    trained = trained_rows()
    sources = rows_of((tables / "smollm2_text-smollm2_135m.md").read_text())
    texts = [row[:5] for row in sources if row[2] != "–"]
    assert rows_of(shown) == [*rows_of(topk), *trained, *texts, *accuracies, *stabilisers]
    dense, io_svd, mixed = (
        numpy.log([float(cell) for cell in row[2:]]) for row in (texts[1], texts[2], texts[-1])
    )
    removed = [f"{100 * share:.0f}" for share in 1 - (mixed - dense) / (io_svd - dense)]
    assert f"removes {removed[0]}, {removed[1]} and {removed[2]} % of the gap" in shown.replace(
        "\n", " "
    )
    assert f"at {' / '.join(texts[-1][2:])}" in README
    for start in (2, 5):  # The rows of IO-SVD at 0.8 and at 0.6.
        dense, io_svd, _, last = (
            numpy.log([float(cell) for cell in trained[row][2:5]])
            for row in (1, start, start + 1, start + 2)
        )
        removed = [f"{100 * share:.0f}" for share in 1 - (last - dense) / (io_svd - dense)]
        text = f"{removed[0]}, {removed[1]} and {removed[2]} % at {trained[start][0]}"
        assert text in " ".join(shown.split())
    assert f"it is at {trained[4][2]}" in README
    assert "0.2245 against 0.2499" in shown  # The predicted KL of spectral and loss-aware ranks.
    predicted = {row[1]: row[-1] for row in rows_of(topk)}
    assert predicted["io_svd_spectral[whitening.top_k=5]"] == "0.2245"
    assert predicted["io_svd[whitening.top_k=5]"] == "0.2499"
    damage = {}
    for row in rows_of((tables / "main-smollm2_135m.md").read_text())[1:]:
        if row[2] != "–" and row[0] in ("1", "0.8"):
            damage[row[1]] = numpy.log([float(cell.replace(",", "")) for cell in row[2:5]])
    ratios = (damage["DipSVD"] - damage["Dense"]) / (damage["SVD-LLM"] - damage["Dense"])
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times SVD-LLM's damage" in shown
    assert numpy.exp(damage["IO-SVD+"] - damage["Dense"]).max() < 1
    spectral = numpy.exp(damage["IO-SVD+, spectral (ours)"])
    assert " / ".join(f"{value:.2f}" for value in spectral) in shown
    assert (damage["SAES-SVD"] > damage["SVD-LLM"]).all()


def test_the_page_of_models_that_see_is_of_rendered_tables() -> None:
    tables, shown = ROOT / "results" / "tables", rows_of(page("vlm"))
    rendered = rows_of((tables / "vlm-tiny_vlm.md").read_text())
    once = [[*row[:4], row[5]] for row in rendered if row[2] != "–"]
    seeds = rows_of((tables / "vlm_seeds-tiny_vlm.md").read_text())
    spread = [row[:4] for row in seeds if row[2] != "–"]
    start = shown.index(once[0])
    assert shown[start : start + len(once)] == once
    start = shown.index(spread[0])
    assert shown[start : start + len(spread)] == spread
    cache = rows_of((tables / "vlm_cache-tiny_vlm.md").read_text())
    equal = [[*row[:4], *row[5:7]] for row in cache]
    start = shown.index(equal[0])
    assert shown[start : start + len(equal)] == equal
    images = rows_of((tables / "vlm_images-tiny_vlm.md").read_text())
    blind = {row[0]: row[2] for row in images if row[1] == "io_svd[dataset=drawn_text]"}
    assert f"IO-SVD keeps {blind['0.8']} at 0.8 and {blind['0.6']} at 0.6" in page("vlm")


def trained_rows() -> list[list[str]]:
    """IO-SVD, tuned and trained, at two ratios, from two tables."""
    found = {}
    for name in ("beyond", "methods"):  # IO-SVD is in the second alone.
        text = (ROOT / "results" / "tables" / f"{name}-smollm2_135m.md").read_text()
        found |= {(row[0], row[1]): row[:5] for row in rows_of(text) if row[2] != "–"}
    names = ["IO-SVD", "IO-SVD, tuned (ours)", "IO-SVD, end to end (ours)"]
    wanted = [("ratio", "method"), ("1", "Dense"), *((r, n) for r in ("0.8", "0.6") for n in names)]
    return [found[key] for key in wanted]


def test_int8_at_the_same_bytes_is_the_rendered_table() -> None:
    frame = pandas.read_csv(ROOT / "results" / "tables" / "remapping-tiny.csv")
    measured = frame.set_index(["label", "ratio"])["pydoc_ppl"]
    labels = ["io_svd", "io_svd_remap", "io_svd_plus", "dense_rtn"]
    shown = [row for row in rows_of(page("int8")) if len(row) == 4][1:]
    assert len(shown) == len(labels)
    for label, (_, *cells) in zip(labels, shown, strict=True):
        assert cells == [f"{measured[label, ratio]:.2f}" for ratio in (0.8, 0.6, 0.4)], label


def test_predictions_are_those_of_the_rendered_tables() -> None:
    names = {"tiny": "tiny", "babyllama-1.0M": "babyllama-1.0M-tok361", "books-6M": "books-6M"}
    head, *shown = [row for row in rows_of(page("prediction")) if len(row) == 7]
    assert [row[0] for row in shown] == list(names)
    for name, *cells in shown:
        path = ROOT / "results" / "tables" / f"predict-{names[name]}.csv"
        frame = pandas.read_csv(path).set_index("ratio")
        for ratio, cell in zip(head[1:], cells, strict=True):
            row = frame.loc[float(ratio)]
            assert cell == f"{row['kl'] / row['predicted_kl']:.1f}", (name, ratio)


def test_speeds_are_those_of_the_benchmark() -> None:
    head, *rendered = rows_of((ROOT / "results" / "tables" / "benchmark-tiny.md").read_text())
    columns = [head.index(n) for n in ("whole / svd_llm", "whole / step", "statistics / step")]
    measured = {row[0]: [row[i] for i in (*columns, head.index("its limit"))] for row in rendered}
    five = [row for row in rows_of(page("speed")) if len(row) == 5]
    shown = {name: cells for name, *cells in five if name in measured}
    assert len(shown) == 13
    assert all(measured[name] == cells for name, cells in shown.items())


def test_the_allocation_and_the_correction_of_the_example_work() -> None:
    imports = """
from collections.abc import Mapping
from dataclasses import dataclass, replace
from iosvd.allocation import Allocation, CalibrationObjective
from iosvd.budget import Budget
from iosvd.correction import Correction, CorrectionInputs, CorrectionResult
from iosvd.types import Spectrum
"""
    written: dict[str, Any] = {}
    for example in examples(page("extending")):
        if "class Rms" not in example:
            exec(imports + example, written)
    dense = build("llama")
    norms = {name: site.weight.norm() for name, site in find_sites(dense, SiteSelection()).items()}
    tokens = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(1))
    method = Method(Identity(), written["Equal"](), written["SameNorm"]())
    result = compress(dense, tokens, ratio=0.5, method=method)
    ranks = set(result.plan.ranks.values())
    assert result.plan.ratio_achieved <= 0.5 and len(ranks) == 1
    for name, layer in low_rank_layers(result.model).items():
        torch.testing.assert_close(layer.product().norm(), norms[name], rtol=1e-5, atol=0)
    halves = replace(method, quantization=Half())
    rounded = compress(build("llama"), tokens, ratio=0.3, method=halves)
    for name, layer in low_rank_layers(rounded.model).items():
        torch.testing.assert_close(layer.product().norm(), norms[name], rtol=2e-2, atol=0)


def test_the_authors_way_is_slower_and_larger_as_the_page_of_speed_says() -> None:
    assert "take less time and less memory" in page("speed")
    for row in rows_of((ROOT / "results" / "tables" / "plain-codes-cpu.md").read_text())[1:]:
        assert float(row[3]) < 1 and float(row[6]) < 1, row[0]
