"""A trained mixture of experts: the embedded model, its MLPs copied into four experts, trained on.

The copies compute what the one MLP did, whatever the router says, so the mixture starts as the
embedded model; noise on the copies and a minute of training make experts of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import iosvd
from iosvd.data.texts import Dataset, Split
from iosvd.data.windows import calibration_windows, evaluation_windows
from iosvd.evaluation.perplexity import perplexity
from iosvd.models.linear_form import expert_of
from iosvd.models.loading import Dtype, Model, load_model, load_tokenizer

TINY = Model("tiny", embedded=True, dtype=Dtype.float32, seq_len=256)
TEXT = Dataset("pydoc", builtin=True, evaluation=Split("validation"))
STEPS, BATCH, LENGTH = 60, 4, 128


def upcycled() -> MixtralForCausalLM:
    """Return the embedded model as a mixture of four experts, of which a token has two."""
    dense = load_model(TINY)
    known = {n: v for n, v in dense.config.to_dict().items() if n in MixtralConfig().to_dict()}
    known.pop("model_type"), known.pop("architectures")
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(
        MixtralConfig(**known, num_local_experts=4, num_experts_per_tok=2)
    ).float()
    weights = mixture.state_dict()
    for name, tensor in dense.state_dict().items():
        if name in weights:
            weights[name].copy_(tensor)
    for number, layer in enumerate(dense.model.layers):
        place = f"model.layers.{number}.mlp.experts."
        gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        weights[f"{place}gate_up_proj"].copy_(gate_up.expand(4, -1, -1))
        weights[f"{place}down_proj"].copy_(layer.mlp.down_proj.weight.expand(4, -1, -1))
    return mixture.eval()


def windows(count: int, seed: int, length: int = LENGTH) -> Tensor:
    return calibration_windows(load_tokenizer(TINY), TEXT, count, length, seed)


@pytest.fixture(scope="module")
def evaluation() -> Tensor:
    return evaluation_windows(load_tokenizer(TINY), TEXT, 256, windows=20)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """The weights of the mixture after training."""
    mixture, text = upcycled(), windows(STEPS * BATCH, seed=1)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if ".experts." in name:
                parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in text.split(BATCH):
        mixture(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in mixture.state_dict().items()}


def mixture_of(weights: dict[str, Tensor]) -> MixtralForCausalLM:
    model = upcycled()
    model.load_state_dict(weights)
    return model


def test_the_mixture_starts_as_the_embedded_model(evaluation: Tensor) -> None:
    found = perplexity(upcycled(), evaluation[:8])
    assert found == pytest.approx(perplexity(load_model(TINY), evaluation[:8]), rel=1e-4)


def test_its_experts_are_compressed_and_both_metrics_are_better_than_one(
    trained: dict[str, Tensor], evaluation: Tensor
) -> None:
    dense = mixture_of(trained)
    whole = perplexity(dense, evaluation)
    first, second = (
        dense.get_parameter("model.layers.2.mlp.experts.down_proj")[e].detach() for e in (0, 1)
    )
    assert float((first - second).norm() / first.norm()) > 0.3  # They are different experts.
    found = {}
    for method in ("svd_llm", "io_svd"):
        calibration = windows(48, seed=0, length=256)
        result = iosvd.compress(mixture_of(trained), calibration, method=method, ratio=0.6)
        experts = {
            n: s for n, s in result.plan.sites.items() if expert_of(result.model, n) is not None
        }
        assert len(experts) == 6 * 4 * 2
        held = sum(s.out_features * s.in_features for s in experts.values())
        assert held > 0.8 * result.plan.parameters_total  # What the ratio counts.
        assert result.plan.ratio_achieved == pytest.approx(0.6, abs=0.005)
        found[method] = perplexity(result.model, evaluation)
    assert whole < found["io_svd"] < found["svd_llm"]
