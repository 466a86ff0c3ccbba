"""Block refinement against a training written out here, and what it must keep."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build, divided
from test_correction import TOKENS, error_of_blocks, run
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import iosvd
from iosvd.allocation import Uniform
from iosvd.budget import Budget
from iosvd.cache.calibration import Calibration
from iosvd.cache.disk import Cache
from iosvd.correction import (
    Anchored,
    BlockLoss,
    CorrectionInputs,
    Distilled,
    Ladder,
    NoCorrection,
    Refinement,
    RefitOptions,
    Sequential,
)
from iosvd.correction.blockwise import BlockSteps, _key
from iosvd.errors import ConfigError, ModelError
from iosvd.factorization import Factorization
from iosvd.layers.replacement import low_rank_layers
from iosvd.method import Method
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import compress
from iosvd.quantization import NoQuantization, Remap
from iosvd.statistics.block_curvature import block_curvatures
from iosvd.statistics.kl_metric import KLMetric, cotangents
from iosvd.truncation import TruncatedSites
from iosvd.whitening import Input


def refining(closed_form: RefitOptions | None = None, **options: Any) -> Ladder:
    return Ladder(closed_form=closed_form, refinement=Refinement(**options))


ANCHORED = RefitOptions(trust=1.0, ridge=1e-6, stream=False, output_metric=False, dense_sites=False)
BOTH = refining(closed_form=ANCHORED, epochs=12, learning_rate=3e-3, batch_windows=4, held_out=0.0)


def state(correction: Any, ratio: float = 0.5, **options: Any) -> dict[str, Tensor]:
    return run(correction, ratio, **options).model.state_dict()


def trained_by_hand(dense: nn.Module, block: nn.Module, options: Refinement) -> list[float]:
    """Train the first block of a model whose first block is compressed; return its errors."""
    with torch.no_grad():
        hidden = dense.model.embed_tokens(TOKENS)
        positions = torch.arange(TOKENS.shape[1])[None]
        rotary = dense.model.rotary_emb(hidden, positions)
        length = TOKENS.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)[None, None]

        def forward(layer: nn.Module, windows: Tensor) -> Tensor:
            found = layer(
                hidden[windows],
                attention_mask=mask.expand(len(windows), 1, length, length),
                position_ids=positions,
                position_embeddings=rotary,
            )
            return found[0] if isinstance(found, tuple) else found

        target = forward(dense.model.layers[0], torch.arange(len(TOKENS)))
    parameters = list(block.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    steps = options.epochs * 3  # Nine windows in batches of four.
    warm, step = math.ceil(0.1 * steps), 0
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(options.epochs):
        for batch in torch.randperm(len(TOKENS), generator=generator).split(4):
            share = (step - warm) / (steps - warm)
            falling = 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * share))
            optimizer.param_groups[0]["lr"] = options.learning_rate * (
                step / warm if step < warm else falling
            )
            optimizer.zero_grad()
            (forward(block, batch) - target[batch]).square().mean().backward()
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()  # type: ignore[union-attr]
            if norm > 1:
                for parameter in parameters:
                    parameter.grad /= norm  # type: ignore[operator]
            optimizer.step()
            step += 1
        with torch.no_grad():
            errors.append(float((forward(block, torch.arange(9)) - target).square().mean()))
    return errors


def test_the_first_block_is_what_a_training_written_out_gives() -> None:
    options = refining(epochs=5, learning_rate=3e-3, batch_windows=4, held_out=0.0)
    block = copy.deepcopy(run(NoCorrection(), 0.5).model.model.layers[0])
    assert options.refinement is not None
    errors = trained_by_hand(build("llama"), block, options.refinement)
    assert errors == sorted(errors, reverse=True)  # So the last epoch is the best.
    refined = run(options, 0.5).model.model.layers[0].state_dict()
    for name, tensor in block.state_dict().items():
        torch.testing.assert_close(refined[name], tensor, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_return_more_nearly_what_the_dense_ones_do(family: str) -> None:
    closed = error_of_blocks(run(Sequential(anchored=True), 0.5, family), family)
    refined = error_of_blocks(run(BOTH, 0.5, family), family)
    assert refined < 0.9 * closed


@pytest.mark.parametrize("closed_form", [None, ANCHORED])
def test_full_rank_and_no_drift_leave_every_block_as_it_is(closed_form: RefitOptions) -> None:
    dense = build("llama").state_dict()
    found = state(refining(closed_form=closed_form, epochs=2), 1.0)
    for name, tensor in dense.items():
        assert torch.equal(found[name], tensor), name


def test_it_begins_with_the_closed_form() -> None:
    """With a rate of zero nothing else happens."""
    still = refining(closed_form=ANCHORED, learning_rate=0.0, epochs=1)
    expected = state(Sequential(anchored=True))
    for name, tensor in state(still).items():
        assert torch.equal(tensor, expected[name]), name
    plain = state(NoCorrection())
    for name, tensor in state(refining(learning_rate=0.0, epochs=1)).items():
        assert torch.equal(tensor, plain[name]), name


def test_a_rate_that_diverges_leaves_the_block_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = state(Sequential(anchored=True))
    wild = refining(closed_form=ANCHORED, learning_rate=1e30, epochs=3, held_out=0.0)
    with caplog.at_level(logging.WARNING, logger="iosvd"):
        found = state(wild)
    for name, tensor in start.items():
        assert torch.equal(found[name], tensor), name
    warned = [r.message for r in caplog.records if "diverges" in r.message]
    assert warned == [
        f"the training of block {number}, squared error diverges; lower"
        " correction.refinement.learning_rate"
        for number in range(2)
    ]


def test_the_error_on_held_out_windows_never_rises() -> None:
    """Random tokens: what is learned of six windows says nothing about three others."""
    held = refining(epochs=20, learning_rate=3e-2, batch_windows=3, held_out=0.34)
    dense, plain, refined = build("llama"), run(NoCorrection(), 0.5), run(held, 0.5)
    with torch.no_grad():
        outputs = [
            model.model(input_ids=TOKENS[6:], output_hidden_states=True).hidden_states[1]
            for model in (dense, plain.model, refined.model)
        ]
    errors = [float((found - outputs[0]).square().mean()) for found in outputs[1:]]
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_what_is_not_to_be_trained_stays() -> None:
    dense, plain = build("llama").state_dict(), run(NoCorrection(), 0.7)
    factors = run(refining(dense_sites=False, others=False, epochs=3, held_out=0.0), 0.7)
    everything = run(refining(epochs=3, held_out=0.0), 0.7)
    low_rank = low_rank_layers(factors.model)
    found, whole = factors.model.state_dict(), everything.model.state_dict()
    stays = [name for name in found if name.rpartition(".")[0] not in low_rank]
    assert any(name.endswith("proj.weight") for name in stays)  # A site that stays dense.
    for name in stays:
        assert torch.equal(found[name], dense[name]), name
    assert any(not torch.equal(found[n], t) for n, t in plain.model.state_dict().items())
    norms = [name for name in whole if "layernorm" in name]
    assert norms
    for name in norms:
        assert not torch.equal(whole[name], dense[name]), name


def test_refined_norms_and_dense_sites_are_saved(tmp_path: Path) -> None:
    result = run(refining(epochs=3, held_out=0.0), 0.7)
    iosvd.save(result.model, tmp_path / "model", result.plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("correction", [BOTH, Anchored()], ids=lambda c: type(c).__name__)
def test_an_interrupted_correction_resumes_at_the_next_block(
    correction: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = state(correction)
    module = "iosvd.correction.blockwise"
    corrected = __import__(module, fromlist=["_corrected"])._corrected
    numbers: list[int] = []

    def interrupted(*given: Any) -> dict[str, Tensor]:
        if given[2].number == 1 and len(numbers) == 1:
            raise KeyboardInterrupt
        numbers.append(given[2].number)
        return corrected(*given)

    monkeypatch.setattr(f"{module}._corrected", interrupted)
    store = Cache(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        run_in(store, correction)
    numbers.append(-1)
    resumed = run_in(store, correction)
    assert numbers == [0, -1, 1]
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    run_in(store, correction)
    assert numbers == [0, -1, 1]  # A third run corrects nothing.


def run_in(store: Cache, correction: Any) -> nn.Module:
    return compress(
        build("llama"),
        TOKENS,
        ratio=0.5,
        batch_size=4,
        store=store,
        identity="llama",
        **divided({"correction": correction}),
    ).model


def test_the_windows_of_a_batch_may_pass_in_parts() -> None:
    """Steps of four windows, passed in batches of three or of four."""
    # The closed form of so few tokens amplifies rounding, and so does AdamW.
    few = refining(epochs=2, learning_rate=1e-3, batch_windows=4, held_out=0.0)
    found = []
    for batch_size in (3, 4):
        options = divided({"correction": few})
        result = compress(build("llama"), TOKENS, ratio=0.5, batch_size=batch_size, **options)
        # Not the factors: components have no sign.
        with torch.no_grad():
            found.append(result.model(input_ids=TOKENS).logits)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("held_out", "windows", "message"),
    [
        (0.05, 8, "held_out=0.05 of 8 calibration windows leaves none to hold out"),
        (0.9, 3, "held_out=0.9 of 3 calibration windows leaves none to train on"),
    ],
)
def test_a_share_that_leaves_no_window_is_refused(
    held_out: float, windows: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Refinement(held_out=held_out).trained_windows(windows)


def test_blocks_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = iter([torch.device("cuda:0"), torch.device("cuda:1")])
    monkeypatch.setattr("iosvd.correction.ladder.device_of", lambda block: next(devices))
    with pytest.raises(ConfigError, match="decoder blocks are spread over 2 devices"):
        run(BOTH, 0.5)


def test_sites_of_a_refined_model_are_those_of_the_plan() -> None:
    result = run(BOTH, 0.5)
    assert set(find_sites(build("llama"), SiteSelection())) == set(result.plan.sites)
    assert {n: x.rank for n, x in low_rank_layers(result.model).items()} == result.plan.ranks


def test_float16_is_refined_where_hidden_states_are_large() -> None:
    """The gradient of the summed error exceeds float16's range."""

    def errors(dtype: torch.dtype, correction: Any) -> Tensor:
        model = build("llama", dtype)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[3] *= 100
            dense = model.model(input_ids=TOKENS).last_hidden_state.float()
        method = Method(Input(), Uniform(), correction)
        compress(model, TOKENS, method=method, ratio=0.5, batch_size=9)
        with torch.no_grad():
            found = model.model(input_ids=TOKENS).last_hidden_state.float()
        return (found - dense).square().mean()

    refined = refining(epochs=10, learning_rate=1e-2, batch_windows=4, held_out=0.0)
    plain = errors(torch.float16, NoCorrection())
    single, half = (errors(dtype, refined) for dtype in (torch.float32, torch.float16))
    assert single < 0.9 * plain
    assert half < plain - 0.5 * (plain - single)


def test_excluded_layers_are_not_trained() -> None:
    dense = build("llama").state_dict()
    selection = SiteSelection(exclude=["*o_proj"])
    found = run(refining(epochs=3, held_out=0.0), 0.5, selection=selection).model
    for name, tensor in found.state_dict().items():
        if "o_proj" in name:
            assert torch.equal(tensor, dense[name]), name


def test_a_block_without_anything_to_train_stays() -> None:
    dense = build("llama").state_dict()
    found = state(refining(dense_sites=False, others=False, epochs=2), 1.0)
    for name, tensor in dense.items():
        assert torch.equal(found[name], tensor), name


def test_the_key_of_a_block_knows_which_ranks_are_factorised() -> None:
    """Rank 12 of a square site of 16 is dense, but factorised where int8 halves its cost."""
    calibration = Calibration.of(build("llama"), TOKENS)
    ranks = dict.fromkeys(calibration.sites, 12)
    keys = []
    for quantization in (NoQuantization(), Remap()):
        budget = Budget(calibration.shapes, 1.0, quantization.cost)
        inputs = CorrectionInputs(
            calibration=calibration,
            sites=TruncatedSites(ranks, calibration.sites, {}, budget),
            statistics={},
            whitening=Input(),
            allocation=Uniform(),
            factorization=Factorization(),
        )
        keys.append(_key(inputs, BlockSteps(), 0).digest)
    assert keys[0] != keys[1]


def test_what_an_earlier_run_has_refitted_is_counted_by_distillation(tmp_path: Path) -> None:
    store = Cache(tmp_path / "cache")
    options = {"store": store, "identity": "llama", "batch_size": 4}
    for correction in (Anchored(), Distilled(rank=2, epochs=1)):
        settings = divided({"correction": correction, **options})
        found = compress(build("llama"), TOKENS, ratio=0.5, **settings)
    blocks = [kept for kept in store.entries() if kept.kind == "blocks"]
    spent = sum(
        json.loads((kept.path / "header.json").read_text())["cost"]["seconds"] for kept in blocks
    )
    assert len(blocks) == 2
    assert found.stages["correction"].seconds > spent > 0


def test_corrected_blocks_leave_the_cache_first(tmp_path: Path) -> None:
    store = Cache(tmp_path / "cache")
    run_in(store, Anchored())
    kinds = [kept.kind for kept in store.entries()]
    assert kinds[:2] == ["blocks", "blocks"]
    assert set(kinds[2:]) == {"spectra", "statistics"}


def test_the_curvature_behind_a_block_is_that_of_its_cotangents() -> None:
    """By autograd through the whole model, with the same random signs."""
    metric = KLMetric(top_k=0, probes=2)
    model, outputs = build("llama", torch.float64), list[Tensor]()
    for block in model.model.layers:
        block.register_forward_hook(
            lambda *call: outputs.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1])
        )
    logits = model(input_ids=TOKENS).logits
    signs = torch.stack([metric.signs(i, 12, 31) for i in range(len(TOKENS))], dim=1)
    expected = [torch.zeros(16, 16, dtype=torch.float64) for _ in outputs]
    for scalar in cotangents(logits, metric, signs):
        found = torch.autograd.grad(scalar, outputs, retain_graph=True)
        for total, one in zip(expected, found, strict=True):
            total += torch.einsum("wti,wtj->ij", one, one) / (2 * TOKENS.numel())
    found = block_curvatures(build("llama", torch.float64), TOKENS, metric, batch_size=4)
    for total, one in zip(expected, found, strict=True):
        torch.testing.assert_close(one, total, rtol=1e-5, atol=1e-9)


KL = refining(loss=BlockLoss.kl, epochs=12, learning_rate=3e-3, batch_windows=4, held_out=0.0)


def test_errors_of_the_output_are_weighed_by_the_curvature(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log states ½ E[eᵀ C e] of the first block, before and after."""
    dense, plain = build("llama"), run(NoCorrection(), 0.5).model
    assert KL.refinement is not None
    whole = Ladder(refinement=dataclasses.replace(KL.refinement, shrinkage=0.0))
    with caplog.at_level(logging.INFO, logger="iosvd"):
        refined = run(whole, 0.5).model
    (line,) = [r.getMessage() for r in caplog.records if r.message.startswith("block 0")]
    curvature = block_curvatures(build("llama"), TOKENS, KLMetric(0), 4)[0]
    with torch.no_grad():
        target, *found = (
            model.model(input_ids=TOKENS, output_hidden_states=True).hidden_states[1]
            for model in (dense, plain, refined)
        )
    errors = [
        float(torch.einsum("wti,ij,wtj->wt", e, curvature, e).mean() / 2)
        for e in (one - target for one in found)
    ]
    assert errors[1] < 0.8 * errors[0]
    said = [float(word.rstrip(",")) for word in line.split() if word[0].isdigit() and "." in word]
    assert said == pytest.approx(errors, rel=1e-3)


def test_a_curvature_without_directions_is_the_squared_error() -> None:
    """Shrunk to a multiple of the identity; small enough steps are not clipped."""
    settings = {"epochs": 4, "learning_rate": 1e-3, "batch_windows": 4, "held_out": 0.0}
    found = []
    for options in ({"loss": BlockLoss.kl, "shrinkage": 1.0}, {"loss": BlockLoss.squared}):
        model = run(refining(**settings, **options), 0.5).model  # type: ignore[arg-type]
        with torch.no_grad():
            found.append(model(input_ids=TOKENS).logits)
    with torch.no_grad():
        plain = run(NoCorrection(), 0.5).model(input_ids=TOKENS).logits
    assert (found[0] - found[1]).norm() < 0.05 * (found[0] - plain).norm()


def test_blocks_that_share_more_than_states_have_no_curvature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("iosvd.statistics.passes.chained_blocks", lambda model, tokens: [])
    with pytest.raises(ModelError, match=r"set correction\.refinement\.loss=squared"):
        run(refining(loss=BlockLoss.kl, epochs=1), 0.5, whitening=Input())
