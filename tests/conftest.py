"""What several test files need: the shared material, small models of every family, random sites."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
import pkgutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools  # noqa: F401 (before distutils: torch.compile imports it, and refuses the other order)
import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from iosvd.allocation import Spectral
from iosvd.data.texts import Dataset, Split
from iosvd.method import Method
from iosvd.models.loading import Dtype, Model
from iosvd.statistics.needs import SiteStatistics
from iosvd.whitening import InputOutput

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two threads each on two cores are many times slower than one thread each.
    os.environ["OMP_NUM_THREADS"] = "1"  # For processes that tests start.
    torch.set_num_threads(1)

# Minutes each: first, so that no worker is left with one at the end.
_LONGEST = ("test_order_on_tiny", "test_order_on_babyllama", "test_faults", "test_launching")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {stem: number for number, stem in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Spare what is imported now, a million objects, from every later search for garbage.

    A compression ends with one, which takes longer than compressing a model of two small blocks.
    """
    gc.collect()
    gc.freeze()


SHARED = Path(os.environ.get("IOSVD_SHARED", Path(__file__).parents[2] / "shared")).resolve()

_WIDTHS: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GROUPED = {"intermediate_size": 24, "num_key_value_heads": 2}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_WIDTHS, **_GROUPED)),
    "llama_tied": lambda: LlamaForCausalLM(
        LlamaConfig(**_WIDTHS, **_GROUPED, tie_word_embeddings=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_WIDTHS, **_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_WIDTHS, **_GROUPED, head_dim=4)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_WIDTHS, ffn_dim=24, word_embed_proj_dim=16)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_WIDTHS, intermediate_size=24)),
}


def shared(*parts: str) -> Path:
    """Return a path of the shared material, or skip where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent; set IOSVD_SHARED to the folder that has it")
    return path


def all_variants(package: ModuleType) -> list[type]:
    """Every implementation in the files of a package: a new one is tested without being named."""
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            mine = isinstance(value, type) and value.__module__ == module.__name__
            if mine and dataclasses.is_dataclass(value) and "__call__" in dir(value):
                found.append(value)
    assert found
    return found


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a small random model of a family, far enough from zero that nothing cancels."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if dtype in (torch.float16, torch.bfloat16):
        # As users get it: `.to(half)` would also round the rotary frequencies, loading does not.
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return type(model).from_pretrained(folder, dtype=dtype).eval()
    return model.to(dtype).eval()


def random_statistics(m: int, n: int, seed: int = 0) -> tuple[Tensor, SiteStatistics]:
    """Return a weight and plausible statistics of a site, in float64, with unequal channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(5 * n, n) @ normal(n, n) * torch.linspace(0.1, 3, n, dtype=torch.float64)
    y = normal(5 * m, m) @ normal(m, m) * 1e-2  # Output metrics are small in real models.
    gradient, weight = normal(m, n), normal(m, n)
    g = normal(5 * m, m) @ normal(m, m) * 1e-2
    statistics = SiteStatistics(
        site="block.site",
        input_metric=x.T @ x / len(x),
        input_magnitude=x.abs().mean(0),
        kl_metric=y.T @ y / len(y),
        fisher_metric=g.T @ g / len(g),
        fisher_rows=g.square().mean(0),
        fisher_elements=torch.outer(g.square().mean(0), x.square().mean(0)),
        kronecker_left=g.T @ g,
        kronecker_right=x.T @ x / len(x) ** 2,
        gradient=gradient,
    )
    return weight, statistics


@pytest.fixture(scope="session")
def baby() -> Model:
    """The small trained model that compresses like a large one."""
    path = shared("models", "babyllama-1.0M-tok361")
    return Model("babyllama", path=str(path), dtype=Dtype.float32, seq_len=256)


@pytest.fixture(scope="session")
def stories() -> Dataset:
    """The text it was trained on: every story starts a sequence."""
    path = shared("data", "text", "tinystories")
    return Dataset("stories", path=str(path), document_windows=True, evaluation=Split("validation"))


def divided(options: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the options that make up a method; InputOutput and Spectral are the defaults."""
    parts = {"whitening": InputOutput(), "allocation": Spectral()}
    names = {field.name for field in fields(Method)}
    parts |= {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return {"method": Method(**parts), **rest}
