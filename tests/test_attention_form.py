"""Queries, keys and values as one layer, or as one for each head: the same model, other sites."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build, divided
from seeing import build as build_seeing
from seeing import windows_of
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import iosvd
from experiments.small_models import small_model
from iosvd.allocation import ComponentImportance, Uniform
from iosvd.cache.calibration import Calibration
from iosvd.correction import WeightedRefit
from iosvd.errors import ModelError
from iosvd.layers.modules import LowRankLinear
from iosvd.layers.replacement import low_rank_layers, twin_of
from iosvd.method import Goal, Method
from iosvd.models.attention_form import JOINT, Form, form_of, from_form_, to_form_
from iosvd.models.sites import SiteSelection, cached_widths, decoder_of, find_sites
from iosvd.pipeline import factorize
from iosvd.presets import preset
from iosvd.runs.config import compose_run
from iosvd.statistics.collect import collect
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.needs import Needs
from iosvd.sweeps.expansion import expand
from iosvd.trials import TruncationTrials
from iosvd.whitening import Asvd, Identity, Input

TOKENS = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(1))
ATTENTIVE = ["llama", "qwen2", "qwen3", "opt"]  # qwen2 and opt have biases.
JOINED = SiteSelection(include=[f"*.{JOINT}"], form=Form.joint)
DIVIDED = SiteSelection(include=["*.q_proj.*", "*.k_proj.*", "*.v_proj.*"], form=Form.heads)
BOTH = [JOINED, DIVIDED]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("selection", BOTH, ids=lambda s: s.form.value)
@pytest.mark.parametrize("family", ATTENTIVE)
def test_the_model_computes_the_same_and_comes_back(family: str, selection: SiteSelection) -> None:
    model, expected = build(family), build(family).state_dict()
    model.requires_grad_(False)
    before = logits(model)
    to_form_(model, decoder_of(model), selection.form)
    assert form_of(model) is selection.form
    assert_close(logits(model), before)
    assert_close(logits(twin_of(model)), before)
    assert not any(p.requires_grad for p in model.parameters())
    names = [name.rpartition(".self_attn.")[2] for name in find_sites(model, selection)]
    heads, groups = (
        getattr(model.config, n, 4) for n in ("num_attention_heads", "num_key_value_heads")
    )
    count = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
    divided = [f"{name}.{head}" for name in count for head in range(count[name])]
    assert sorted(names) == sorted(2 * ([JOINT] if selection.form is Form.joint else divided))
    from_form_(model)
    assert form_of(model) is Form.separate
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_joint_layer_computes_once_for_three_readers_and_keeps_nothing() -> None:
    model, calls = build("llama"), []
    to_form_(model, decoder_of(model), Form.joint)
    attention = model.model.layers[0].self_attn
    attention.get_submodule(JOINT).register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert len(calls) == 1
    shared = attention.q_proj._shared
    assert shared._input is None and shared._output is None
    x = torch.randn(1, 3, attention.qkv_proj.in_features)
    first = attention.q_proj(x)  # A pass that ends here.
    with torch.no_grad():
        attention.qkv_proj.weight.mul_(2)
    assert_close(attention.q_proj(x), 2 * first)  # Computed anew: this reader comes again.


def test_a_twin_reads_its_own_joint_layer() -> None:
    model = build("llama")
    to_form_(model, decoder_of(model), Form.joint)
    twin = twin_of(model)
    attention = twin.model.layers[0].self_attn
    assert attention.q_proj._shared.attention is attention
    iosvd.compress(twin, TOKENS, method="svd", ratio=0.3, selection=JOINED)
    assert isinstance(attention.qkv_proj, LowRankLinear)
    assert_close(logits(model), logits(build("llama")))


@pytest.mark.parametrize("method", ["svd_llm", "io_svd", "io_svd_anchored", "io_svd_plus"])
@pytest.mark.parametrize("selection", BOTH, ids=lambda s: s.form.value)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_method_keeps_the_budget_and_comes_back_from_a_checkpoint(
    family: str, selection: SiteSelection, method: str, tmp_path: Path
) -> None:
    model = build(family)
    total = sum(site.weight.numel() for site in find_sites(build(family), selection).values())
    result = iosvd.compress(model, TOKENS, method=method, ratio=0.6, selection=selection)
    assert result.plan.parameters_total == total
    assert result.plan.bits_kept <= 0.6 * 16 * total
    iosvd.save(model, tmp_path / "saved", result.plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(model))
    assert form_of(again) is selection.form


@pytest.mark.parametrize("selection", BOTH, ids=lambda s: s.form.value)
def test_dense_export_has_the_layers_of_the_architecture(
    selection: SiteSelection, tmp_path: Path
) -> None:
    model = build("llama")
    iosvd.compress(model, TOKENS, method="svd_llm", ratio=0.6, selection=selection)
    expected = logits(model)
    iosvd.export_dense(model, tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert again.state_dict().keys() == build("llama").state_dict().keys()
    assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_a_joint_layer_is_the_svd_of_the_stacked_weights() -> None:
    """With the identity: an independent SVD of [W_q; W_k; W_v], and one right factor for three."""
    model = build("llama")
    attention = model.model.layers[0].self_attn
    stacked = torch.cat([attention.get_submodule(n).weight for n in ("q_proj", "k_proj", "v_proj")])
    iosvd.compress(model, TOKENS, method="svd", ratio=0.4, selection=JOINED)
    layer = low_rank_layers(model)[f"model.layers.0.self_attn.{JOINT}"]
    u, s, vt = torch.linalg.svd(stacked.detach().double())
    best = (u[:, : layer.rank] * s[: layer.rank]) @ vt[: layer.rank]
    assert_close((layer.left @ layer.weight).double(), best, rtol=1e-4, atol=1e-5)
    m, n = stacked.shape
    assert layer.left.numel() + layer.weight.numel() == layer.rank * (m + n)


def test_what_is_cached() -> None:
    kinds = {Form.separate: SiteSelection(), Form.joint: JOINED, Form.heads: DIVIDED}
    for form, selection in kinds.items():
        model = build("qwen2")
        names = find_sites(model, selection)
        attention = model.model.layers[0].self_attn
        keys = model.config.num_key_value_heads * attention.head_dim
        widths = cached_widths(model, names)
        assert sum(widths.values()) == 2 * keys * model.config.num_hidden_layers, form


def test_a_vision_tower_caches_nothing() -> None:
    model = build_seeing("llava")
    names = [name for name, module in model.named_modules() if name.endswith("k_proj")]
    widths = cached_widths(model, names)
    assert {name for name, width in widths.items() if width} == {
        name for name in names if "language_model" in name
    }
    assert any("vision_tower" in name for name in names)


def test_importance_is_the_rms_of_the_derivatives_of_single_windows() -> None:
    """Against autograd of the dense weight: σ_i u_iᵀ G_s v_i."""
    model = build("llama", torch.float64)
    name = f"model.layers.0.self_attn.{JOINT}"
    calibration = Calibration.of(model, TOKENS, selection=replace(JOINED, include=[name]))
    spectra = factorize(
        model, TOKENS, method="svd", ratio=0.5, selection=replace(JOINED, include=[name])
    ).spectra
    budget = Goal(0.5).budget(calibration, preset("svd", 0.5))
    trials = TruncationTrials(calibration, spectra, budget)
    count = len(spectra[name].right)
    found = [trials.component_derivatives({name: count}, torch.tensor([w])) for w in range(8)]
    score = torch.stack([one[name] for one in found]).square().mean(0).sqrt()
    layer, spectrum, total = model.get_submodule(name), spectra[name], 0.0
    layer.weight.requires_grad_(True)
    for window in TOKENS.split(1):
        loss = model(input_ids=window, labels=window).loss
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        left, right = spectrum.left.to(gradient), spectrum.right.to(gradient)
        total = total + ((left.T @ gradient) * right).sum(1).square()
    expected = (total / len(TOKENS)).sqrt()
    assert_close(score.double(), expected, rtol=1e-4, atol=1e-8)
    # Windows beyond those there are count none.
    some = [ComponentImportance(windows)(spectra, budget, trials) for windows in (0, 8, 99)]
    assert some[0] == some[1] == some[2]


def test_importance_goes_where_the_loss_hangs() -> None:
    """A layer that reaches nothing keeps the least that it may."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    selection = replace(JOINED, include=[f"*.{JOINT}"])
    method = Method(Identity(), ComponentImportance())
    result = iosvd.compress(model, TOKENS, method=method, ratio=0.5, selection=selection)
    first, second = (result.plan.sites[f"model.layers.{i}.self_attn.{JOINT}"] for i in (0, 1))
    assert first.rank == 1 and second.rank > 1


def test_fisher_elements_are_mean_squares_of_single_windows() -> None:
    model = build("llama")
    name = "model.layers.0.self_attn.q_proj.1"
    sites = {name: find_sites(model, DIVIDED)[name]}
    found = collect(model, TOKENS, sites, Needs(fisher_elements=True), batch_size=3)[name]
    sites[name].weight.requires_grad_(True)
    total = torch.zeros_like(sites[name].weight)
    for window in TOKENS.split(1):
        loss = model(input_ids=window, labels=window).loss
        total += torch.autograd.grad(loss, sites[name].weight)[0].square()
    assert_close(found.need("fisher_elements"), total.detach() / len(TOKENS), rtol=1e-4, atol=1e-10)


def test_the_weighted_refit_lowers_the_weighted_error_and_nothing_else() -> None:
    """Against plain truncation, site by site; a weight of one entry moves that entry most."""
    model, plain = build("llama"), build("llama")
    fisher = collect(plain, TOKENS, find_sites(plain, DIVIDED), Needs(fisher_elements=True))
    dense = {n: s.weight.detach().clone() for n, s in find_sites(plain, DIVIDED).items()}
    options = {"ratio": 0.5, "selection": DIVIDED}
    iosvd.compress(plain, TOKENS, method=Method(Input(), Uniform()), **options)
    refit = WeightedRefit(steps=200, learning_rate=1e-3)
    iosvd.compress(model, TOKENS, method=Method(Input(), Uniform(), refit), **options)
    before, after = low_rank_layers(plain), low_rank_layers(model)
    assert before.keys() == after.keys() and len(before) == len(dense)
    for name, weight in dense.items():
        F = fisher[name].need("fisher_elements")
        errors = [
            (F * (weight - m[name].left @ m[name].weight).square()).sum() for m in (before, after)
        ]
        assert errors[1] < 0.999 * errors[0], name
        assert before[name].rank == after[name].rank


def test_experts_without_a_token_have_no_importance() -> None:
    model = small_model("mixtral")
    tokens = torch.randint(0, 31, (24, 12), generator=torch.Generator().manual_seed(0))
    method = Method(Identity(), ComponentImportance(windows=2))
    result = iosvd.compress(model, tokens, method=method, ratio=0.5)
    assert result.plan.bits_kept <= 0.5 * result.plan.bits_total


def test_every_method_of_the_experiment_has_its_own_layers() -> None:
    forms = {run.label: run.model.sites.form for run in expand(["experiment=vlm_qkv"], sweep=True)}
    joint = {name for name, form in forms.items() if form is Form.joint}
    assert joint == {"qsvd", "io_svd_joint"} and forms["wsvd"] is Form.heads
    assert len(forms) == 7 and forms["svd_llm_qkv"] is Form.separate


def test_wsvd_is_its_parts() -> None:
    run = compose_run(["method=wsvd", "model=tiny"])
    assert run.method == Method(Input(), Uniform(), WeightedRefit())
    assert run.model.sites.form is Form.heads
    joint = compose_run(["method=qsvd", "model=tiny"])
    assert joint.method == Method(Asvd(), ComponentImportance())
    assert joint.model.sites.include == JOINED.include and joint.model.sites.form is Form.joint


def test_qsvd_of_a_model_that_sees(tmp_path: Path) -> None:
    model, windows = build_seeing("idefics3"), windows_of("idefics3")
    result = iosvd.compress(model, windows, method="qsvd", ratio=0.6, selection=JOINED)
    assert set(result.plan.sites) == {
        f"model.text_model.layers.{i}.self_attn.{JOINT}" for i in (0, 1)
    }
    iosvd.save(model, tmp_path / "saved", result.plan)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(windows.logits(again), windows.logits(model))


def test_what_cannot_have_such_a_form() -> None:
    with pytest.raises(ModelError, match="no attention with layers q_proj, k_proj and v_proj"):
        find_sites(build("gpt_neox"), JOINED)
    model = build("llama")
    to_form_(model, decoder_of(model), Form.joint)
    with pytest.raises(ModelError, match="attention is joint already; load it anew"):
        find_sites(model, DIVIDED)
    iosvd.compress(model, TOKENS, method="svd", ratio=0.4, selection=JOINED)
    with pytest.raises(ModelError, match="q_proj"):
        iosvd.prepare_for_generation(model, "latent")


def test_statistics_of_a_joint_layer_hold_those_of_its_parts() -> None:
    """The diagonal blocks of its output metric are the metrics of q, k and v."""
    needs = Needs(input_metric=True, kl_metric=KLMetric(5))
    plain, joint = build("llama"), build("llama")
    parts = collect(plain, TOKENS, find_sites(plain, SiteSelection()), needs)
    whole = collect(joint, TOKENS, find_sites(joint, JOINED), needs)
    start = 0
    metric = whole[f"model.layers.0.self_attn.{JOINT}"]
    for name in ("q_proj", "k_proj", "v_proj"):
        part = parts[f"model.layers.0.self_attn.{name}"]
        stop = start + len(part.need("kl_metric"))
        block = metric.need("kl_metric")[start:stop, start:stop]
        assert_close(block, part.need("kl_metric"), rtol=1e-4, atol=1e-8)
        assert_close(metric.need("input_metric"), part.need("input_metric"))
        start = stop
    assert start == len(metric.need("kl_metric"))


def test_families_without_other_forms_are_not_touched() -> None:
    assert all(form_of(build(family)) is Form.separate for family in FAMILIES)
    result = iosvd.compress(build("llama"), TOKENS, **divided({}), ratio=0.5)
    assert "form" not in result.model.config.quantization_config.to_dict()


def test_a_joint_layer_of_the_architecture_itself_is_an_ordinary_site() -> None:
    model = small_model("phi3")
    tokens = TOKENS % model.config.vocab_size
    found = iosvd.compress(model, tokens, method="svd", ratio=0.5)
    assert any(name.endswith(f"self_attn.{JOINT}") for name in found.plan.sites)
    assert not any(cached_widths(model, found.plan.sites).values())


@pytest.mark.parametrize("selection", BOTH, ids=lambda s: s.form.value)
@pytest.mark.parametrize("asked", [0.6, 0.3])
def test_a_budget_of_the_cache_alone_is_met(selection: SiteSelection, asked: float) -> None:
    """With a long enough cache the ratio is that of its entries, whatever the layers' form."""
    model = build("llama")
    found = iosvd.compress(
        model, TOKENS, method="svd", ratio=asked, cache_tokens=10**7, selection=selection
    )
    sites = found.plan.sites
    widths = cached_widths(model, sites)
    kept = {name: sites[name].rank for name, width in widths.items() if width}
    assert all(rank <= widths[name] for name, rank in kept.items())
    total = sum(widths.values())
    assert total == 2 * 2 * model.config.num_key_value_heads * model.config.head_dim
    assert asked - len(kept) / total <= sum(kept.values()) / total <= asked
