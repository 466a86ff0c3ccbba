"""Every YAML composes, checks, and lists exactly the options of the dataclass it stands for."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import all_variants
from hydra.utils import get_class
from omegaconf import OmegaConf

import iosvd.allocation
import iosvd.whitening
from iosvd.data.texts import Dataset
from iosvd.errors import ConfigError, IosvdError
from iosvd.models.loading import ASSETS, Model
from iosvd.presets import conf_folder
from iosvd.runs.composition import compose
from iosvd.runs.config import compose_run, config_of, to_run
from iosvd.runs.run import Evaluation, Tracking
from iosvd.sweeps.expansion import baselines, expand
from iosvd.tables.spec import table_spec
from iosvd.tables.sweep import Sweep

CONF = conf_folder()
SETTINGS = {
    "model/local": [f"model.path={ASSETS / 'tiny'}"],
    "model/hub": ["model.hub_id=organisation/name"],
    "dataset/local": ["dataset.path=/some/folder"],
    "dataset/local_questions": ["dataset.path=/some/folder"],
}
GROUPS = (
    *("model", "dataset", "whitening", "allocation", "correction", "quantization"),
    *("method", "eval", "wandb"),
)
LLAMAS = ["llama_7b", "llama_13b", "llama_30b", "llama2_7b", "llama3_8b"]
MODELS = [*LLAMAS, "vicuna_7b", "mistral_7b", "opt_6_7b", "qwen3_8b", "tiny", "local"]


def presets() -> list[str]:
    return sorted(f"{group}/{path.stem}" for group in GROUPS for path in (CONF / group).glob("*"))


def options(preset: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{preset}.yaml").read_text()) or {}


@pytest.mark.parametrize("preset", presets())
def test_what_a_run_records_composes_the_same_run(preset: str) -> None:
    """And says of every option what the composition says."""
    overrides = [preset.replace("/", "="), "runtime.memory_gib=3", *SETTINGS.get(preset, [])]
    composed = compose(overrides)
    run = to_run(composed, "label")
    recorded = config_of(run)
    assert to_run(OmegaConf.create(recorded), "label") == run
    groups = OmegaConf.to_container(OmegaConf.masked_copy(composed, list(recorded)), resolve=True)
    assert isinstance(groups, dict)
    for group, options in groups.items():
        for key, value in options.items() if isinstance(options, dict) else ():
            if key == "_target_":
                assert get_class(value) is get_class(recorded[group][key])
            elif not isinstance(value, dict):
                assert recorded[group][key] == value, (group, key)


def test_the_groups_hold_what_the_project_promises() -> None:
    names = set(presets())
    assert {f"model/{name}" for name in MODELS} <= names
    assert {f"dataset/{name}" for name in ("wikitext2", "c4", "ptb", "pydoc", "local")} <= names
    published = [
        "svd",
        "fwsvd",
        "asvd",
        "svd_llm",
        "svd_llm_v2",
        "dip_svd",
        "zs_svd",
        "obd_llm",
        "gfwsvd",
        "io_svd",
    ]
    ks = [f"k{k}" for k in (1, 2, 10, 20, 50, "_all")]
    kinds = ["uniform", "zero_sum", "spectral", "hull", "renormalized", "exact", "not_qk"]
    ours = [f"io_svd_{kind}" for kind in (*ks, *kinds)]
    methods = {"dense", *published, *ours}
    assert {f"method/{name}" for name in methods} <= names


@pytest.mark.parametrize("preset", presets())
def test_options_are_those_of_the_dataclass(preset: str) -> None:
    group = preset.split("/")[0]
    written = options(preset)
    if group == "dataset" and "defaults" in written:  # A variation of another.
        written = {**options(f"dataset/{written['defaults'][0]}"), **written}
    classes = {"model": Model, "dataset": Dataset, "eval": Evaluation, "wandb": Tracking}
    if "_target_" in written:
        implementation = get_class(written.pop("_target_"))
    elif group in classes:
        implementation = classes[group]
    else:
        return  # A method preset only chooses.
    written.pop("defaults", None)
    fields = {field.name for field in dataclasses.fields(implementation)}
    if group == "eval":
        fields -= {"texts", "questions"} - set(written)
    assert set(written) == fields


@pytest.mark.parametrize("package", [iosvd.whitening, iosvd.allocation])
def test_every_implementation_has_a_preset(package: Any) -> None:
    group = package.__name__.split(".")[-1]
    targets = {get_class(options(p)["_target_"]) for p in presets() if p.startswith(group)}
    assert targets == set(all_variants(package))


def test_a_sweep_has_one_dense_run_for_each_model() -> None:
    # The dense method has no such options.
    ablation = baselines(["experiment=ablation_topk", "whitening.seed=1"])
    assert [(run.label, run.goal.ratio) for run in ablation] == [("dense", 1.0)]
    families = baselines(["experiment=families", "model=tiny,llama_7b", "eval.windows=3"])
    assert [run.model.name for run in families] == ["tiny", "llama_7b"]
    assert {run.eval.windows for run in families} == {3}


def test_runs_of_a_sweep_are_what_each_would_be_alone() -> None:
    """They are composed together where they differ in the ratio alone."""
    sweep = expand(["experiment=main", "method=svd,io_svd", "ratio=0.5,1", "eval=own"], sweep=True)
    alone = [["experiment=main", "eval=own", f"method={m}", f"ratio={r}"] for m, r in
             (("svd", 0.5), ("svd", 1), ("io_svd", 0.5), ("io_svd", 1))]  # fmt: skip
    assert sweep == [compose_run(overrides) for overrides in alone]


def test_rows_of_a_sweep_are_named_after_what_distinguishes_them() -> None:
    seeds = ["method=svd,io_svd", "ratio=0.8", "calibration.seed=0,1"]
    assert [run.label for run in expand(seeds, sweep=True)] == [
        *("svd[calibration.seed=0]", "svd[calibration.seed=1]"),
        *("io_svd[calibration.seed=0]", "io_svd[calibration.seed=1]"),
    ]
    assert len(baselines(seeds)) == 1  # What calibrates does not change the dense model.
    fixed = ["experiment=demo", "factorization.algorithm=svd"]
    labels = {run.label for run in expand(fixed, sweep=True)}
    assert labels == {"svd", "asvd", "svd_llm", "io_svd", "io_svd_spectral"}


def test_the_protocol_is_the_papers() -> None:
    run = expand(["experiment=main"], sweep=True)[0]
    assert (run.data.calibration.windows, run.data.calibration.seq_len) == (256, 2048)
    assert (run.model.name, run.data.dataset.name, run.eval.seq_len) == (
        "llama_7b",
        "wikitext2",
        2048,
    )
    assert [text.name for text in run.eval.texts.values()] == ["wikitext2", "ptb", "c4"]
    assert run.eval.windows == run.eval.zero_shot.limit == 0
    seven = "openbookqa arc_easy arc_challenge winogrande hellaswag piqa mathqa"
    assert run.eval.zero_shot.tasks == seven.split()


def make(*arguments: str) -> str:
    """What make would run."""
    command = ["make", "-n", "-o", "install", *arguments]
    root = Path(__file__).parents[1]
    # The tests are run by make themselves, whose options are not meant for this one.
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=root, env=outside, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_make_targets_choose_the_model_and_the_texts(tmp_path: Path) -> None:
    assert "-m experiment=main  ||" in make("table1")
    # The paper's model by name, the embedded one by default.
    assert "ablation_whitening model=llama_7b dataset=wikitext2 eval=paper" in make("table4")
    assert "-m experiment=ablation_whitening  ||" in make("table-ablation_whitening")
    assert "experiment=families model=tiny dataset=pydoc eval=pydoc" in make("table3", "MODEL=tiny")
    assert "experiment=remapping model=llama2_7b dataset=wikitext2 eval=paper ratio=0.8" in make(
        "table6", "MODEL=llama2_7b", "ARGS=ratio=0.8"
    )
    both = make("table1", "MODEL=tiny", "DATA=/data")
    assert "pydoc" not in both and "eval.zero_shot.path=/data/tasks" in both
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    line = make("figure3", f"MODEL={tmp_path}", "DATA=/data").splitlines()[1]
    options = [
        o for o in shlex.split(line.rstrip("\\ ")) if "=" in o and not o.startswith("status")
    ]
    runs = expand(options, sweep=True)
    assert {run.model.seq_len for run in runs} == {64}
    paths = (runs[0].data.dataset.path, runs[0].eval.texts["wikitext2"].path)
    assert paths == ("/data/text/wikitext2",) * 2
    assert runs[0].eval.texts["c4"].path == "/data/text/c4"
    assert runs[0].eval.zero_shot.path == "/data/tasks"


def test_the_demo_is_every_method_at_three_ratios() -> None:
    runs = expand(["experiment=demo"], sweep=True)
    methods = ("svd", "asvd", "svd_llm", "io_svd", "io_svd_spectral")
    assert {(r.label, r.goal.ratio) for r in runs} == {
        (m, x) for m in methods for x in (0.8, 0.6, 0.4)
    }
    assert {run.model.name for run in runs} == {"tiny"}
    (one,) = expand(["experiment=demo", "ratio=0.5", "method=svd"], True)
    assert one.goal.ratio == 0.5


def test_models_are_named_after_their_folder_or_hub_id() -> None:
    folder = ASSETS / "tiny"
    local = compose_run(["model=local", f"model.path={folder}/"]).model
    assert (local.name, local.seq_len) == ("tiny", 256)  # The context of that model.
    assert compose_run(["model=hub", "model.hub_id=some/model"]).model.name == "model"


def test_a_changed_method_is_named_so() -> None:
    assert compose_run(["allocation=spectral"]).label == "io_svd[allocation=spectral]"
    assert compose_run(["ratio=0.5", "calibration.seed=3"]).label == "io_svd"


def test_evaluation_texts_are_those_of_the_paper_or_of_the_calibration() -> None:
    paper = compose_run(["eval=paper", "eval.texts.c4.path=/some/folder"]).eval
    assert list(paper.texts) == ["wikitext2", "ptb", "c4"]
    assert paper.texts["c4"].path == "/some/folder"
    own = compose_run(["dataset=wikitext2", "model=llama_7b"])
    assert own.eval.texts == {"own": own.data.dataset}
    assert own.eval.seq_len == own.data.calibration.seq_len == 2048


def test_the_methods_experiment_is_every_published_method_at_three_ratios() -> None:
    runs = expand(["experiment=methods"], sweep=True)
    assert {run.goal.ratio for run in runs} == {0.8, 0.6, 0.4}
    assert {run.model.name for run in runs} == {"tiny"}
    published = [
        "svd",
        "fwsvd",
        "asvd",
        "svd_llm",
        "svd_llm_v2",
        "dip_svd",
        "zs_svd",
        "obd_llm",
        "gfwsvd",
        "io_svd",
    ]
    assert set(published) <= {run.label for run in runs}


def test_a_preset_may_hang_on_the_ratio() -> None:
    """ZS-SVD's floor is 0 above 0.4, 0.3 there, 0.2 below; in a sweep as for each run alone."""
    runs = expand(["method=zs_svd,svd_llm", "ratio=0.8,0.6,0.4,0.3"], sweep=True)
    floors = {(run.label, run.goal.ratio): run.method.min_rank_fraction for run in runs}
    assert floors == {
        **{("zs_svd", 0.8): 0.0, ("zs_svd", 0.6): 0.0, ("zs_svd", 0.4): 0.3, ("zs_svd", 0.3): 0.2},
        **{("svd_llm", ratio): 0.0 for ratio in (0.8, 0.6, 0.4, 0.3)},
    }


def test_a_sweep_is_checked_at_its_own_ratios() -> None:
    runs = expand(["method=svd", "ratio=0.95,0.9", "min_rank_fraction=0.85"], sweep=True)
    assert [run.goal.ratio for run in runs] == [0.95, 0.9]
    with pytest.raises(IosvdError, match=r"min_rank_fraction=0\.85 keeps more than ratio=0\.8"):
        expand(["method=svd", "ratio=0.95,0.8", "min_rank_fraction=0.85"], sweep=True)


def test_a_target_takes_the_place_of_the_ratio() -> None:
    run = compose_run(["whitening.top_k=0", "target_kl=0.05"])
    assert (run.goal.ratio, run.goal.target_kl) == (None, 0.05)
    assert compose_run([]).goal.ratio == 0.8
    (one, two) = expand(["whitening.top_k=0", "target_kl=0.05,0.1", "method=io_svd"], sweep=True)
    assert (one.goal.target_kl, two.goal.target_kl) == (0.05, 0.1)
    assert one.label != two.label
    assert [b.label for b in baselines(["whitening.top_k=0", "target_kl=0.05,0.1"])] == ["dense"]


def test_every_method_preset_says_where_its_numbers_are_from() -> None:
    for path in sorted((CONF / "method").glob("*.yaml")):
        comments = [line for line in path.read_text().splitlines()[1:] if line.startswith("#")]
        assert comments, path.name
        cited = any(mark in "".join(comments) for mark in ("arXiv", "METHODS", "ours"))
        assert cited or path.stem in ("dense", "dense_rtn", "svd"), path.name


BAD = [
    (["whitening.topk=3"], "unknown option whitening.topk; options of whitening: top_k, renorm"),
    (["+whitening.foo=3"], "unknown option whitening.foo; options of whitening: damping_input"),
    (["foo=3"], "unknown option foo; options: model, dataset"),
    (["foo.bar=3"], "unknown option foo.bar; options: model, dataset"),
    (["whitening.topk=3", "foo=3"], "unknown option"),
    (["+foo=3"], "unknown option foo; options: allocation, cache_tokens, calibration"),
    (["model.sites.incl=[a]"], "unknown option model.sites.incl; options of model.sites: include"),
    (["eval.texts.own.foo=3"], "unknown option eval.texts.own.foo; options of eval.texts.own"),
    (["whitening=foo"], "Could not find 'whitening/foo' Available options in 'whitening': asvd"),
    (["whitening.top_k=five"], "whitening.top_k: Value 'five' of type 'str' could not be conv"),
    (["whitening.estimator=foo"], "whitening.estimator: Invalid value 'foo', expected one of"),
    (["model.dtype=int8"], "model.dtype: Invalid value 'int8', expected one of [float16, bfloat"),
    (["ratio=much"], "ratio=much is not a number"),
    (["ratio=0"], "ratio 0 is outside (0, 1]"),
    (["ratio=1.5"], "ratio 1.5 is outside (0, 1]"),
    (["ratio=1.0000001"], "ratio 1.0000001 is outside (0, 1]"),
    (["model.name=../../etc"], "model.name=../../etc begins with a dot, but files are named"),
    (["model.name=/tmp/x"], "model.name=/tmp/x has / in it, but files are named after it"),
    (["model.name=a/b"], "model.name=a/b has / in it"),
    (["model.name=''"], "model.name= is empty"),
    (["model.name=.locks"], "model.name=.locks begins with a dot"),
    ([f"model.name={'x' * 300}"], "x is longer than 100 bytes, but files are named after it"),
    (["dataset.name=a/../b"], "dataset.name=a/../b has / in it"),
    (["eval=paper", "eval.texts.c4.name=x/y"], "eval.texts.c4.name=x/y has / in it"),
    (["ratio=nan"], "ratio nan is outside (0, 1]"),
    (["ratio=null"], "ratio is not set; set ratio=0.8 or target_kl=0.05"),
    (["target_kl=0.05", "ratio=0.5", "whitening.top_k=0"], "target_kl chooses the ratio; leave ou"),
    (["target_kl=0.05"], "target_kl needs whitening=input_output with whitening.top_k=0"),
    (["target_kl=0.05", "whitening=input"], "target_kl needs whitening=input_output with whitenin"),
    (["target_kl=0", "whitening.top_k=0"], "target_kl=0 is not above 0"),
    (["target_kl=0.1", "whitening.top_k=0", "quantization=half"], "target_kl needs quantization=n"),
    (["min_rank_fraction=0.7", "ratio=0.6"], "min_rank_fraction=0.7 keeps more than ratio=0.6 all"),
    (["min_rank_fraction=1.5"], "min_rank_fraction=1.5 is outside [0, 1]"),
    (
        ["calibration.halves=other", "allocation=spectral"],
        "this allocation needs no gradient",
    ),
    (
        ["calibration.halves=same", "calibration.windows=1"],
        "halves=same needs 2 windows",
    ),
    (
        ["calibration.halves=half"],
        "calibration.halves: Invalid value 'half', expected one of",
    ),
    (
        ["allocation.gradient_windows=300"],
        "but only 256 windows are there for it",
    ),
    (
        ["allocation.gradient_windows=200", "calibration.halves=other"],
        "allocation.gradient_windows=200, but only 128 windows are there",
    ),
    (["whitening=channel_weighted", "whitening.share=2"], "share=2.0 is above 1"),
    (["whitening=channel_weighted", "whitening.factor=0"], "factor=0.0 is below 1"),
    (["whitening=gfwsvd", "whitening.passes=1"], "passes=1 is below 2"),
    (
        ["whitening=fisher", "whitening.labels=drawn"],
        "whitening.labels: Invalid value 'drawn'",
    ),
    (
        ["allocation=layer_importance", "allocation.beta=2"],
        "beta=2, energy=0.95, spread=0.25",
    ),
    (["allocation=layer_importance", "allocation.trials=0"], "trials=0 is below 1"),
    (
        ["allocation=type_grouped", "allocation.counted=all"],
        "counted: Invalid value 'all'",
    ),
    (
        ["allocation=sensitivity_search", "calibration.windows=4"],
        "allocation.windows=8, but only 4 windows are there for it",
    ),
    (["eval.kl=all"], "eval.kl: Invalid value 'all', expected one of [none, model, sites]"),
    (["eval.kl_windows=-1"], "eval.kl_windows=-1 is below 0"),
    (["ratio=["], "no viable alternative"),
    (["model=local"], "model.path is not set; set model.path=FOLDER"),
    (["model=hub"], "model.hub_id is not set; set model.hub_id=VALUE"),
    (["dataset=local"], "dataset.path is not set; set dataset.path=FOLDER"),
    (["quantization=null"], "Config group override must be a string"),
    (["~whitening"], "whitening is not set"),
    (["~ratio"], "ratio is not set"),
    (["wandb.checkpoint=true"], "wandb.checkpoint=true needs runtime.save_checkpoint=true"),
    (["wandb=on"], "Could not find 'wandb/on' Available options in 'wandb': disabled offline"),
    (["eval.zero_shot.limit=-1"], "limit=-1 is below 0"),
    (["eval.zero_shot.task=[piqa]"], "unknown option eval.zero_shot.task; options of eval.zero_sh"),
    (["runtime.batch_requests=0"], "runtime.batch_requests=0 is below 1"),
    (["model=local", "model.path=/no/folder"], "/no/folder is not a model folder"),
    (["whitening.top_k=-1"], "top_k=-1 is below 0"),
    (["whitening.probes=0"], "probes=0 is below 1"),
    (["whitening.damping_output=-1"], "damping_output=-1.0 is below 0"),
    (["allocation.gradient_windows=-1"], "gradient_windows=-1 is below 0"),
    (["dataset.calibration.max_documents=-1"], "max_documents=-1 is below 0"),
    (["calibration.windows=0"], "calibration.windows=0 is below 1"),
    (["eval.texts={}", "~eval.texts.own"], "eval.texts and eval.questions are empty"),
    (["factorization.precision=float32"], "needs factorization.algorithm=svd"),
    (["whitening._target_=iosvd.whitening.Nothing"], "whitening._target_ names no class"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_wrong_option_is_one_line_that_lists_the_right_ones(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(IosvdError) as error:
        compose_run(overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sweep_fails_before_it_starts_where_one_cell_is_wrong() -> None:
    with pytest.raises(IosvdError, match="outside"):
        expand(["experiment=demo", "ratio=0.8,1.2"], sweep=True)


@pytest.mark.parametrize("name", ["../method/io_svd", "/etc/passwd", "a/b"])
def test_a_table_is_named_by_a_name_and_not_by_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match="files are named after it"):
        Sweep.from_overrides([f"experiment={name}"])
    with pytest.raises(ConfigError, match="files are named after it"):
        table_spec(name)
