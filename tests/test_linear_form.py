"""Conv1D and fused experts as linear layers: the same function, and sites like others."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import iosvd
from experiments.small_models import small_model
from iosvd.errors import ConfigError, ModelError
from iosvd.layers.replacement import compressed_layers
from iosvd.models.linear_form import Experts, expert_of, from_linear_form_, to_linear_form_
from iosvd.models.routing import active_sites, routed_tokens, without_idle_experts
from iosvd.models.sites import SiteSelection, covered_share, find_sites
from iosvd.presets import preset
from iosvd.statistics.collect import collect
from iosvd.statistics.fisher import FisherMetric
from iosvd.statistics.needs import Needs
from iosvd.windows import Windows

FUSED = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "phimoe"]
MIXTURE = "mixtral"


def tokens(windows: int = 8, length: int = 24) -> Tensor:
    return torch.randint(3, 500, (windows, length), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize("kind", [*FUSED, "gpt2", "openai-gpt"])
def test_the_other_form_computes_the_same_and_turns_back_into_the_first(kind: str) -> None:
    model = small_model(kind)
    before, weights = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    to_linear_form_(model)
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert any(isinstance(module, Experts) for module in model.modules()) == (kind in FUSED)
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-7)
    to_linear_form_(model)  # Changes nothing more.
    from_linear_form_(model)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", [*FUSED, "gpt2", "bloom", "gptj", "mpt", "falcon"])
def test_sites_hold_all_but_all_weights_of_the_blocks(kind: str) -> None:
    model = small_model(kind)
    blocks = [p for n, p in model.named_parameters() if p.dim() > 1 and (".0." in n or ".1." in n)]
    assert blocks
    sites = find_sites(model, SiteSelection())
    share = covered_share(model, sites)
    assert share > 0.9
    half = dict(list(sites.items())[: len(sites) // 2])
    assert covered_share(model, half) < share


def test_a_layer_whose_forward_pass_is_another_is_no_site() -> None:
    model = small_model("llama4_text")  # Its routers inherit from nn.Linear and return tuples.
    routers = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "router" in n
    ]
    assert routers
    assert not set(routers) & set(find_sites(model, SiteSelection()))


def test_a_weight_that_stands_in_two_places_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"lm_head shares its weight with transformer\.wte.*exclude"
    ):
        find_sites(small_model("gpt2"), SiteSelection(include=["lm_head"]))
    with pytest.raises(ModelError, match=r"shared_transf.*shares its weight with"):
        find_sites(small_model("zamba"), SiteSelection())


def test_statistics_of_an_expert_are_of_the_tokens_routed_to_it() -> None:
    """R is their mean, E[g gᵀ] their sum over all tokens: their product counts each token once."""
    model = small_model(MIXTURE)
    name = "model.layers.1.mlp.experts.2.down"
    sites = {name: find_sites(model, SiteSelection())[name]}
    seen: list[Tensor] = []
    gradients: list[Tensor] = []

    def see(_: object, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(given[0].detach())
        output.register_hook(gradients.append)  # type: ignore[no-untyped-call]

    needs = Needs(input_metric=True, fisher_metric=FisherMetric())
    found = collect(model, tokens(), sites, needs, batch_size=3)[name]
    hook = sites[name].register_forward_hook(see)
    windows = tokens()
    predictions = windows[:, 1:].numel()
    loss = model(input_ids=windows, labels=windows, use_cache=False).loss
    (loss * predictions).backward()
    hook.remove()
    x, g = seen[0], gradients[0]
    assert 0 < len(x) < windows.numel()
    assert found.input_metric is not None and found.fisher_metric is not None
    torch.testing.assert_close(found.input_metric, x.T @ x / len(x))
    expected = g.T @ g / predictions
    torch.testing.assert_close(found.fisher_metric, expected, rtol=1e-4, atol=1e-9)


def test_the_gradient_of_an_expert_is_that_of_autograd() -> None:
    model = small_model(MIXTURE)
    sites = find_sites(model, SiteSelection())
    name = "model.layers.0.mlp.experts.1.gate_up"
    found = collect(
        model, Windows(tokens()), {name: sites[name]}, Needs(gradient_windows=5), batch_size=2
    )
    few = tokens()[:5]
    loss = model(input_ids=few, labels=few, use_cache=False).loss
    (expected,) = torch.autograd.grad(loss, sites[name].weight)
    assert found[name].gradient is not None
    torch.testing.assert_close(found[name].gradient, expected, rtol=1e-4, atol=1e-8)


def test_gradients_of_single_windows_need_batches_of_one_for_experts() -> None:
    model = small_model(MIXTURE)
    name = "model.layers.0.mlp.experts.1.gate_up"
    sites = {name: find_sites(model, SiteSelection())[name]}
    with pytest.raises(ConfigError, match=r"experts\.1\.gate_up.*runtime\.batch_tokens=24"):
        collect(model, tokens(), sites, Needs(fisher_rows=True), batch_size=2)
    found = collect(model, tokens(2), sites, Needs(fisher_rows=True), batch_size=1)
    expected = torch.zeros(sites[name].out_features)
    for window in tokens(2).split(1):
        loss = model(input_ids=window, labels=window, use_cache=False).loss
        expected += torch.autograd.grad(loss, sites[name].weight)[0].square().sum(1) / 2
    assert found[name].fisher_rows is not None
    torch.testing.assert_close(found[name].fisher_rows, expected, rtol=1e-4, atol=1e-10)


def test_experts_with_few_tokens_stay_dense_and_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = small_model(MIXTURE)
    sites = find_sites(model, SiteSelection())
    counts = routed_tokens(model, Windows(tokens()), sites, batch_size=3)
    experts = {n for n in sites if expert_of(model, n) is not None}
    assert all(counts[n] == tokens().numel() for n in sites if n not in experts)
    per_layer = sum(counts[f"model.layers.0.mlp.experts.{e}.down"] for e in range(4))
    assert per_layer == 2 * tokens().numel()  # Two experts a token.
    kept = without_idle_experts(model, Windows(tokens()), sites, batch_size=3)
    idle = {n for n in experts if counts[n] < sites[n].in_features}
    assert idle and set(sites) - set(kept) == idle
    assert f"{len(idle)} of {len(experts)} layers of experts stay dense" in caplog.text


def test_a_compressed_mixture_counts_its_experts() -> None:
    model = small_model(MIXTURE)
    dense = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    result = iosvd.compress(model, tokens(64), method="io_svd", ratio=0.5)
    kept = sum(p.numel() for n, p in result.model.named_parameters() if "experts" in n)
    assert kept < 0.65 * dense
    assert result.plan.ratio_achieved == pytest.approx(0.5, abs=0.01)
    assert torch.isfinite(logits(result.model)).all()


def test_one_token_runs_through_as_many_experts_as_it_is_routed_to() -> None:
    model = small_model(MIXTURE)
    active = active_sites(model, find_sites(model, SiteSelection()))
    experts = [n for n in active if expert_of(model, n) is not None]
    assert len(experts) == 4 * 2 * 2  # Layers, experts per token, matrices.


def test_a_copy_routes_alone() -> None:
    model = small_model(MIXTURE)
    to_linear_form_(model)
    before, twin = logits(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".experts." in name:
                parameter.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_experts_without_a_token_in_the_windows_of_the_gradient_have_none() -> None:
    model = small_model("qwen3_moe", num_local_experts=16)
    sites = {n: s for n, s in find_sites(model, SiteSelection()).items() if n.endswith(".gate_up")}
    found = collect(model, tokens(), sites, Needs(gradient_windows=1), batch_size=8)
    first = tokens()[:1]
    loss = model(input_ids=first, labels=first, use_cache=False).loss
    weights = [site.weight for site in sites.values()]
    expected = torch.autograd.grad(loss, weights, allow_unused=True)
    assert None in expected  # No token of the first window.
    for name, one in zip(sites, expected, strict=True):
        gradient = found[name].gradient
        assert gradient is not None
        wanted = torch.zeros_like(gradient) if one is None else one
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", ["svd_llm_lora", "io_svd_plus", "zs_svd_corrected"])
def test_corrections_and_int8_work_on_experts_that_are_seldom_used(method: str) -> None:
    model = small_model("qwen3_moe", num_local_experts=16)
    result = iosvd.compress(model, tokens(24, 32), method=method, ratio=0.6)
    assert torch.isfinite(logits(result.model)).all()
    assert result.plan.ratio_achieved <= 0.6 + 1e-6


def test_no_bias_is_counted_where_no_correction_adds_one() -> None:
    method = preset("io_svd_anchored", 0.6, None)
    biased = replace(method, correction=replace(method.correction, bias=True))  # type: ignore[type-var]
    result = iosvd.compress(small_model(MIXTURE), tokens(32), method=biased, ratio=0.6)
    layers = compressed_layers(result.model)
    for name, site in result.plan.sites.items():
        if name in layers:
            assert site.added_bias == layers[name].added_bias == (".experts." not in name)


def test_only_idle_experts_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"each sees fewer tokens.*calibration\.windows"):
        iosvd.compress(
            small_model(MIXTURE),
            tokens(1, 8),
            method="io_svd",
            ratio=0.6,
            selection=SiteSelection(include=["*.experts.*"]),
        )


def test_the_default_leaves_a_vision_tower_alone() -> None:
    """Though its blocks are in a list that is called as some decoders call theirs."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "out_hidden_size": 32, "fullatt_block_indexes": [0]}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    model = Qwen2_5_VLForConditionalGeneration(config)
    names = list(find_sites(model, SiteSelection()))
    assert len(names) == 14 and not [name for name in names if "visual" in name]
    assert "visual" in next(iter(find_sites(model, SiteSelection(include=["*visual*"]))))
