"""The ladder's last rung, and the rungs together."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build
from test_correction import TOKENS, run
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import iosvd
from iosvd.allocation import Spectral
from iosvd.cache.disk import Cache
from iosvd.cache.entries import HEADER
from iosvd.correction import (
    Anchored,
    BlockLoss,
    Correction,
    EndToEnd,
    Ladder,
    NoCorrection,
    Refinement,
    RefitOptions,
)
from iosvd.correction.epochs import Reached
from iosvd.correction.training import Fit
from iosvd.errors import ConfigError
from iosvd.evaluation.divergence import divergence
from iosvd.layers.replacement import low_rank_layers
from iosvd.method import Method
from iosvd.pipeline import compress
from iosvd.system.machine import GIB
from iosvd.whitening import InputOutput

MANY = torch.randint(0, 31, (96, 12), generator=torch.Generator().manual_seed(2))
LAST = EndToEnd(epochs=4, learning_rate=1e-2, batch_windows=16)
KL_BLOCKS = Refinement(loss=BlockLoss.kl, epochs=8, learning_rate=3e-3, batch_windows=16)


def kl(correction: Correction, family: str = "llama") -> float:
    """On windows that are not those of the calibration."""
    method = Method(InputOutput(), Spectral(), correction)
    found = compress(build(family), MANY, method=method, ratio=0.5, batch_size=16)
    return divergence(build(family), found.model, TOKENS, 4).kl


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rung_lowers_the_divergence(family: str) -> None:
    first = kl(Anchored(), family)
    second = kl(Ladder(RefitOptions(), KL_BLOCKS), family)
    third = kl(Ladder(RefitOptions(), KL_BLOCKS, LAST), family)
    assert second < 0.97 * first
    assert third < 0.97 * second


def test_the_rate_grows_with_the_root_of_the_divergence() -> None:
    """Errors of the weights twice as large have four times the divergence: steps twice as long."""
    assert LAST.rate(1.0) == LAST.learning_rate
    assert LAST.rate(0.04) == pytest.approx(2 * LAST.rate(0.01))
    assert LAST.rate(-1e-9) == 0.0  # Of the dense model, by rounding.


def test_rungs_may_be_left_out() -> None:
    anchored, ladder = (run(c, 0.5).model for c in (Anchored(), Ladder(RefitOptions())))
    for name, tensor in anchored.state_dict().items():
        assert torch.equal(ladder.state_dict()[name], tensor), name
    plain, empty = (run(c, 0.5).model for c in (NoCorrection(), Ladder()))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(empty.state_dict()[name], tensor), name
    assert kl(Ladder(end_to_end=LAST)) < 0.9 * kl(NoCorrection())


def states(**options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dense = build("llama").state_dict()
    last = EndToEnd(epochs=2, learning_rate=3e-3, batch_windows=3, held_out=0.0, **options)
    return dense, run(Ladder(end_to_end=last), 0.7).model.state_dict()


def test_only_the_blocks_are_trained() -> None:
    dense, found = states()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], dense[name]), name
    norms = [name for name in found if "layernorm" in name]
    assert norms
    for name in norms:
        assert not torch.equal(found[name], dense[name]), name
    dense, factors = states(dense_sites=False, others=False)
    plain = run(NoCorrection(), 0.7).model
    for name, tensor in plain.state_dict().items():
        is_factor = name.rpartition(".")[0] in low_rank_layers(plain)
        assert torch.equal(factors[name], tensor) != is_factor, name


def test_the_dense_model_itself_has_nothing_to_lower() -> None:
    dense = build("llama").state_dict()
    found = run(Ladder(RefitOptions(), KL_BLOCKS, LAST), 1.0).model.state_dict()
    for name, tensor in dense.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_rate_that_diverges_leaves_the_rungs_below(caplog: pytest.LogCaptureFixture) -> None:
    below = run(Ladder(RefitOptions(), KL_BLOCKS), 0.5).model.state_dict()
    wild = EndToEnd(learning_rate=1e30, epochs=2, held_out=0.0)
    with caplog.at_level(logging.WARNING, logger="iosvd"):
        found = run(Ladder(RefitOptions(), KL_BLOCKS, wild), 0.5).model.state_dict()
    for name, tensor in below.items():
        assert torch.equal(found[name], tensor), name
    warned = [r.message for r in caplog.records if "diverges" in r.message]
    assert warned == [
        "the training of KL divergence, end to end diverges; lower"
        " correction.end_to_end.learning_rate"
    ]


def test_a_training_that_does_not_fit_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float32 masters, gradients twice, and moments: five; in the model's dtype three more."""
    blocks = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    needed = 4 * 8 * blocks  # At the ratio 1 all sites stay dense.
    monkeypatch.setattr("iosvd.correction.end_to_end.free_bytes", lambda _: needed - GIB // 2)
    monkeypatch.setattr("iosvd.correction.ladder.correct_blocks", lambda *_: pytest.fail("worked"))
    ladder = Ladder(RefitOptions(), end_to_end=LAST)
    with pytest.raises(ConfigError, match=r"keeps 0\.00 GiB .*, and 0\.50 GiB are missing; take"):
        run(ladder, 1.0)
    monkeypatch.setattr("iosvd.correction.end_to_end.free_bytes", lambda _: needed)
    run(Ladder(end_to_end=LAST), 1.0)


def test_the_whole_ladder_is_saved(tmp_path: Path) -> None:
    result = run(Ladder(RefitOptions(), KL_BLOCKS, LAST), 0.6)
    iosvd.save(result.model, tmp_path / "model", result.plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_windows_that_are_lacking_are_named_before_any_work() -> None:
    few = MANY[:3]
    method = Method(InputOutput(), Spectral(), Ladder(end_to_end=EndToEnd()))
    with pytest.raises(ConfigError, match=r"held_out=0\.1 of 3 calibration windows leaves none"):
        compress(build("llama"), few, method=method, ratio=0.5)


def run_in(store: Cache, dtype: torch.dtype) -> dict[str, Tensor]:
    return compress(
        build("llama").to(dtype),
        TOKENS,
        method=Method(InputOutput(), Spectral(), Ladder(RefitOptions(), end_to_end=LONG)),
        ratio=0.5,
        batch_size=4,
        store=store,
        identity=f"llama {dtype}",
    ).model.state_dict()


LONG = EndToEnd(epochs=5, learning_rate=3e-3, batch_windows=3, held_out=0.0)
STEPS = 3  # By epoch.


@pytest.mark.parametrize(
    ("spared", "dtype"),
    [(0.0, torch.float32), (0.0, torch.bfloat16), (1e9, torch.float32)],
    ids=["every epoch kept", "with masters of their own", "none kept"],
)
def test_an_interrupted_training_resumes_at_the_epoch_that_was_kept(
    spared: float, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_in(Cache(tmp_path / "undisturbed"), dtype)
    store = Cache(tmp_path / "cache")
    gradients, taken = Fit._add_gradients_, list[int]()

    def interrupted(fit: Fit, batch: Tensor) -> None:
        if len(taken) == 2 * STEPS + 1:  # In the third epoch.
            taken.append(-1)
            raise KeyboardInterrupt
        taken.append(len(batch))
        gradients(fit, batch)

    monkeypatch.setattr("iosvd.correction.epochs.SPARED", spared)
    monkeypatch.setattr(Fit, "_add_gradients_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in(store, dtype)
    found = run_in(store, dtype)
    again = len(taken) - taken.index(-1) - 1
    assert again == (3 if spared == 0 else 5) * STEPS
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    before = len(taken)
    assert all(torch.equal(tensor, found[name]) for name, tensor in run_in(store, dtype).items())
    assert len(taken) == before  # A third run trains nothing,
    kept = [json.loads((e.path / HEADER).read_text())["identity"] for e in store.entries()]
    assert [one["epochs"] for one in kept if "epochs" in one] == [0]  # and nothing else is left.


def test_a_scale_of_the_loss_that_was_lowered_is_resumed() -> None:
    reached = [prepared() for _ in range(2)]
    del reached[0].scales[:2]
    assert reached[1].scales[0] != reached[0].scales[0]
    reached[1].restore_(reached[0].entry(0.0))
    assert reached[1].scales == reached[0].scales


def prepared() -> Reached:
    """A training of one parameter after a step."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return Reached([parameter], optimizer, schedule, [torch.ones(3)], [1.0, 0.5, 0.25], 1.0)
