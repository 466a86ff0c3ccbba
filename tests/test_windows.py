"""Windows of images and text, padded: everything is what single windows without padding give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import build as build_text
from seeing import CONFIGS, build, windows_of
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import PreTrainedModel

import iosvd
from experiments.small_models import small_model
from iosvd.cache.keys import CacheKeys
from iosvd.data.image_text import _Encoded
from iosvd.errors import ConfigError, DataError, ModelError
from iosvd.evaluation.divergence import divergence
from iosvd.models.losses import mean_loss
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.presets import preset
from iosvd.statistics.block_curvature import block_curvatures
from iosvd.statistics.collect import collect
from iosvd.statistics.kl_metric import KLMetric, root_times, top_k_probabilities
from iosvd.statistics.needs import Needs
from iosvd.statistics.output_tokens import OutputTokens
from iosvd.windows import IGNORED, Windows

METRIC = KLMetric(5)
EVERYTHING = SiteSelection(include=["*.layers.*"])


@dataclass(frozen=True)
class Alone:
    """A window as users would give it to the model: without padding."""

    tokens: Tensor  # (1, length)
    counted: Tensor  # (length,)
    beside: dict[str, Any]

    def logits(self, model: PreTrainedModel) -> Tensor:
        return model(input_ids=self.tokens, **self.beside).logits[0]

    def loss(self, model: PreTrainedModel) -> Tensor:
        labels = self.tokens[0, 1:].where(self.counted[:-1], IGNORED)
        return cross_entropy(self.logits(model)[:-1], labels, reduction="sum")


def alone(windows: Windows) -> list[Alone]:
    assert windows.filled is not None and windows.counted is not None
    found = []
    for row, one in enumerate(windows.beside or [{} for _ in range(len(windows))]):
        size = int(windows.filled[row].sum())
        beside = {n: x[:, :size] if n.startswith("mm_") else x for n, x in one.items()}
        found.append(
            Alone(windows.tokens[row : row + 1, :size], windows.counted[row, :size], beside)
        )
    return found


def padded_text() -> Windows:
    """Text of unequal length in the models of conftest, all of whose predictions count."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 31, (6, 12), generator=generator)
    filled = torch.arange(12) < torch.tensor([12, 9, 12, 7, 10, 11])[:, None]
    counted = filled & torch.cat([filled[:, 1:], filled[:, :1] & False], 1)
    return Windows(tokens, filled, counted)


CASES = ["text", *CONFIGS]


def case(kind: str) -> tuple[PreTrainedModel, Windows]:
    return (
        (build_text("llama"), padded_text()) if kind == "text" else (build(kind), windows_of(kind))
    )


@pytest.mark.parametrize("kind", CASES)
def test_statistics_are_those_of_single_windows(kind: str) -> None:
    model, windows = case(kind)
    sites = find_sites(model, SiteSelection())
    name = next(site for site in sites if site.endswith("layers.0.self_attn.o_proj"))
    needs = Needs(input_metric=True, kl_metric=METRIC, gradient_windows=4)
    found = collect(model, windows, {name: sites[name]}, needs, batch_size=4)[name]
    layer, seen = sites[name], dict[str, Tensor]()
    layer.weight.requires_grad_(True)

    def see(_: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"], seen["y"] = given[0].reshape(-1, layer.in_features).detach(), output

    hook = layer.register_forward_hook(see)
    R, C, G = (torch.zeros_like(x) for x in (found.input_metric, found.kl_metric, layer.weight))
    for number, window in enumerate(alone(windows)):
        logits = window.logits(model)
        R += seen["x"].T @ seen["x"]
        p, index = top_k_probabilities(logits, METRIC.top_k, METRIC.renormalize)
        signs = METRIC.signs(number, windows.length, 5)[0, : len(logits)].to(p)
        weighted = logits.gather(-1, index) * root_times(p, signs, False)
        (g,) = torch.autograd.grad(weighted[window.counted].sum(), seen["y"])
        g = g.reshape(-1, layer.out_features)
        C += g.T @ g
        if number < 4:
            G += torch.autograd.grad(window.loss(model), layer.weight)[0]
    hook.remove()
    assert windows.filled is not None and windows.counted is not None
    assert_close(found.input_metric, R / windows.filled.sum(), rtol=1e-4, atol=1e-6)
    assert_close(found.kl_metric, C / windows.counted.sum(), rtol=1e-4, atol=1e-6)
    assert_close(found.gradient, G / windows.counted[:4].sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_a_vision_tower_has_the_metrics_of_autograd(kind: str) -> None:
    """Its rows are patches: all of them enter R, and C counts predictions."""
    model, windows = build(kind), windows_of(kind)
    sites = find_sites(model, EVERYTHING)
    name = next(site for site in sites if "vision" in site and site.endswith("layers.0.mlp.fc2"))
    needs = Needs(input_metric=True, kl_metric=METRIC)
    found = collect(model, windows, {name: sites[name]}, needs, batch_size=3)[name]
    layer, seen = sites[name], dict[str, Tensor]()

    def see(_: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"], seen["y"] = given[0].reshape(-1, layer.in_features).detach(), output

    hook = layer.register_forward_hook(see)
    rows, C = [], torch.zeros(layer.out_features, layer.out_features)
    for number, window in enumerate(alone(windows)):
        logits = window.logits(model)
        rows.append(seen["x"])
        p, index = top_k_probabilities(logits, METRIC.top_k, METRIC.renormalize)
        signs = METRIC.signs(number, windows.length, 5)[0, : len(logits)].to(p)
        weighted = logits.gather(-1, index) * root_times(p, signs, False)
        (g,) = torch.autograd.grad(weighted[window.counted].sum(), seen["y"])
        C += g.reshape(-1, layer.out_features).T @ g.reshape(-1, layer.out_features)
    hook.remove()
    x, predictions = torch.cat(rows), int(windows.positions.sum())
    assert_close(found.input_metric, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert_close(found.kl_metric, C / predictions, rtol=1e-4, atol=1e-7)
    assert C.norm() > 0


@pytest.mark.parametrize("kind", CASES)
def test_losses_and_divergences_are_those_of_single_windows(kind: str) -> None:
    model, windows = case(kind)
    count = int(windows.predictions.sum())
    expected = sum(window.loss(model).item() for window in alone(windows)) / count
    assert mean_loss(model, windows, batch_size=4) == pytest.approx(expected, rel=1e-5)
    other, _ = case(kind)
    iosvd.compress(other, windows, method="svd_llm", ratio=0.5)
    kl = 0.0
    for window in alone(windows):
        p, q = (window.logits(m).double().log_softmax(-1) for m in (model, other))
        kl += float((p.exp() * (p - q)).sum(-1)[window.counted].sum().detach())
    found = divergence(model, other, windows, batch_size=4)
    assert found.kl == pytest.approx(kl / int(windows.positions.sum()), rel=1e-4)
    change = mean_loss(other, windows, 4) - mean_loss(model, windows, 4)
    assert found.loss_change == pytest.approx(change, rel=1e-3, abs=1e-5)


METHODS = ("svd_llm", "io_svd", "zs_svd_corrected", "asvd", "dobi_svd", "gfwsvd", "io_svd_plus")


@pytest.mark.parametrize("method", METHODS)
def test_what_stands_in_the_padding_changes_nothing(method: str) -> None:
    windows = windows_of("idefics3")
    assert windows.filled is not None
    other = replace(windows, tokens=windows.tokens.where(windows.filled, 50))
    first, second = build("idefics3"), build("idefics3")
    iosvd.compress(first, windows, method=method, ratio=0.5)
    iosvd.compress(second, other, method=method, ratio=0.5)
    logits = [windows.logits(model) for model in (first, second)]
    assert_close(windows.chosen(logits[0]), windows.chosen(logits[1]), rtol=1e-3, atol=1e-4)


CORRECTIONS = ("io_svd_anchored", "io_svd_full", "svd_llm_lora", "io_svd_distilled", "aa_svd")


@pytest.mark.parametrize("method", CORRECTIONS)
def test_corrections_leave_padding_out(method: str) -> None:
    windows = windows_of("llava", number=12)
    assert windows.filled is not None
    other = replace(windows, tokens=windows.tokens.where(windows.filled, 50))
    found = []
    for given in (windows, other):
        model = build("llava")
        iosvd.compress(model, given, method=method, ratio=0.5, batch_size=4)
        found.append(windows.chosen(windows.logits(model)))
    assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


def test_curvature_of_blocks_counts_what_counts() -> None:
    model, windows = case("idefics3")
    found = block_curvatures(model, windows, METRIC, 4)
    last, total = model.model.text_model.layers[-1], torch.zeros(32, 32)
    seen: list[Tensor] = []
    hook = last.register_forward_hook(lambda *call: seen.append(call[-1]))
    for number, window in enumerate(alone(windows)):
        logits = window.logits(model)
        p, index = top_k_probabilities(logits, METRIC.top_k, METRIC.renormalize)
        signs = METRIC.signs(number, windows.length, 5)[0, : len(logits)].to(p)
        weighted = logits.gather(-1, index) * root_times(p, signs, False)
        (g,) = torch.autograd.grad(weighted[window.counted].sum(), seen.pop())
        total += g[0].T @ g[0]
    hook.remove()
    assert_close(found[-1], total / int(windows.positions.sum()), rtol=1e-4, atol=1e-6)


def test_padding_is_no_label() -> None:
    """Where all real positions count: the last one has no next token."""
    tokens = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 1]])
    filled = torch.arange(4) < torch.tensor([2, 4])[:, None]
    windows = Windows(tokens, filled, filled)
    assert windows.labels.tolist() == [[6, IGNORED, IGNORED, IGNORED], [8, 9, 1, IGNORED]]
    assert windows.predictions.tolist() == [1, 3] and windows.positions.tolist() == [2, 4]


def test_squares_of_gradients_are_those_of_mean_losses_of_single_windows() -> None:
    """Of windows of very different length; E over windows, whatever their number of tokens."""
    model, whole = build_text("llama"), torch.randint(0, 31, (4, 12))
    filled = torch.arange(12) < torch.tensor([12, 3, 4, 3])[:, None]
    windows = Windows(whole, filled, filled)
    name = "model.layers.0.mlp.down_proj"
    sites = {name: model.get_submodule(name)}
    needs = Needs(fisher_rows=True, fisher_elements=True)
    found = collect(model, windows, sites, needs, batch_size=3)[name]
    weight, total = model.get_parameter(f"{name}.weight"), torch.zeros(sites[name].weight.shape)
    weight.requires_grad_(True)
    for row, size in enumerate((12, 3, 4, 3)):
        one = whole[row : row + 1, :size]
        total += torch.autograd.grad(model(input_ids=one, labels=one).loss, weight)[0].square() / 4
    assert_close(found.need("fisher_elements"), total, rtol=1e-4, atol=1e-9)
    assert_close(found.need("fisher_rows"), total.sum(1), rtol=1e-4, atol=1e-9)


def test_kinds_of_tokens_are_padded_with_their_windows() -> None:
    """As a processor gives them, of the item's own length."""
    encoded = _Encoded(torch.arange(5), 3, {"kinds": torch.ones(1, 5), "pixels": torch.ones(1, 7)})
    padded = encoded.padded(8)
    assert padded["kinds"].tolist() == [[1.0] * 5 + [0.0] * 3] and padded["pixels"].shape == (1, 7)


def test_images_of_several_sizes_are_refused_where_positions_depend_on_them() -> None:
    """Qwen2-VL's positions depend on where images stand, which blocks alone do not know."""
    windows = windows_of("qwen2_vl")
    anchored = preset("io_svd_anchored", 0.5)
    iosvd.compress(build("qwen2_vl"), windows, method=anchored, ratio=0.5, batch_size=2)
    moved = windows.tokens.clone()
    moved[3] = moved[3].roll(1)
    kinds = tuple(
        {**one, "mm_token_type_ids": (moved[i : i + 1] == 99).long()}
        for i, one in enumerate(windows.beside)
    )
    elsewhere = replace(windows, tokens=moved, beside=kinds)
    for size in (2, 8):
        with pytest.raises(ModelError, match="masks that depend on where images stand"):
            iosvd.compress(
                build("qwen2_vl"), elsewhere, method=anchored, ratio=0.5, batch_size=size
            )


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_vision_towers_are_compressed_with_images(kind: str) -> None:
    model, windows = build(kind), windows_of(kind)
    # LLaVA takes the features before its tower's last block.
    chosen = replace(EVERYTHING, exclude=["*vision*.1.*"] if kind == "llava" else [])
    result = iosvd.compress(model, windows, method="io_svd", ratio=0.6, selection=chosen)
    seeing = [name for name in result.plan.sites if "vision" in name]
    assert len(seeing) == (6 if kind == "llava" else 12)
    assert any(not result.plan.sites[name].dense for name in seeing)


def test_a_part_that_no_gradient_reaches_is_named() -> None:
    with pytest.raises(ModelError, match=r"vision_tower.*layers\.1.*model\.sites\.exclude"):
        iosvd.compress(
            build("llava"), windows_of("llava"), method="io_svd", ratio=0.6, selection=EVERYTHING
        )


def test_windows_are_divided_and_cut() -> None:
    windows = windows_of("idefics3")
    halves = [windows[:3], windows[torch.tensor([3, 4, 5])]]
    assert torch.equal(torch.cat([half.tokens for half in halves]), windows.tokens)
    assert [len(part) for part in windows.split(4)] == [4, 2]
    assert int(windows.predictions.sum()) == int(windows.positions.sum()) == 2 * (2 + 3 + 4)
    late = windows.from_position(windows.length - 2)
    assert late.counted is not None and windows.counted is not None
    assert int(late.positions.sum()) == int(windows.counted[:, -2:].sum())
    assert torch.equal(Windows(windows.tokens).positions, torch.full((6,), windows.length))
    assert torch.equal(Windows(windows.tokens).predictions, torch.full((6,), windows.length - 1))


def test_images_of_unequal_number_are_padded_with_nothing() -> None:
    one, two = torch.ones(1, 1, 3, 4, 4), torch.ones(1, 2, 3, 4, 4)
    beside = ({"pixel_values": one}, {"pixel_values": two})
    seen: dict[str, Tensor] = {}

    class Model:
        device = torch.device("cpu")

        def __call__(self, **given: Any) -> None:
            seen.update(given)

    Windows(torch.zeros(2, 3, dtype=torch.long), beside=beside).output(Model())  # type: ignore[arg-type]
    assert seen["pixel_values"].shape == (2, 2, 3, 4, 4)
    assert seen["pixel_values"][0, 1].abs().sum() == 0 and seen["pixel_values"][1].min() == 1


def test_other_images_or_masks_are_other_statistics_in_the_cache() -> None:
    windows = windows_of("idefics3")
    assert windows.counted is not None
    changed = [
        windows,
        replace(windows, counted=windows.counted & (torch.arange(windows.length) < 8)),
        replace(
            windows, beside=tuple({"pixel_values": x["pixel_values"] + 1} for x in windows.beside)
        ),
        replace(windows, beside=windows.beside[::-1]),
        Windows(windows.tokens),
    ]
    assert len({CacheKeys.of("m", one, None).tokens for one in changed}) == len(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filled": torch.ones(6, 3) > 0}, "need masks of this shape"),
        ({"counted": None}, "padding has no predictions"),
        ({"beside": ({},)}, "need as many sets of images"),
        ({"beside": ({}, *({"x": torch.ones(1)} for _ in range(5)))}, "need the same kinds of"),
    ],
)
def test_windows_that_contradict_themselves_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        replace(windows_of("llava"), **change)


def test_padding_at_the_start_is_refused() -> None:
    windows = windows_of("llava")
    assert windows.filled is not None
    with pytest.raises(DataError, match="padding_side='right'"):
        replace(windows, filled=windows.filled.flip(1))


def test_tokens_chosen_by_their_place_need_whole_windows() -> None:
    model, windows = case("llava")
    needs = Needs(kl_metric=KLMetric(tokens=OutputTokens(left_out=0.1)))
    with pytest.raises(ConfigError, match="left_out=0"):
        collect(model, windows, find_sites(model, SiteSelection()), needs)


def test_experts_refuse_padding() -> None:
    model = small_model("mixtral")
    tokens = torch.randint(0, 31, (64, 12), generator=torch.Generator().manual_seed(0))
    filled = torch.arange(12).expand(64, 12) < torch.tensor([12, 9, 12, 8] * 16)[:, None]
    windows = Windows(tokens, filled, filled)
    with pytest.raises(ConfigError, match=r"experts.*windows of equal length"):
        iosvd.compress(model, windows, method="svd_llm", ratio=0.5)
