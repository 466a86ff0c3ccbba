"""Targets are found by type and glob, for every family, and never by a model's name."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import build

from iosvd.errors import ConfigError, ModelError, NumericalError
from iosvd.models.sites import SiteSelection, find_sites

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROLES = {
    "llama": LLAMA,
    "llama_tied": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


@pytest.mark.parametrize("family", ROLES)
def test_default_finds_all_linears_of_the_blocks_and_no_other(family: str) -> None:
    sites = find_sites(build(family), SiteSelection())
    roles = Counter(name.rsplit(".", 1)[-1] for name in sites)
    assert roles == dict.fromkeys(ROLES[family], 2)  # Two layers.


def test_include_and_exclude_are_globs() -> None:
    model = build("llama")
    some = SiteSelection(include=["*.mlp.*"], exclude=["*.0.*", "*down*"])
    assert list(find_sites(model, some)) == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_no_match_says_what_there_is() -> None:
    with pytest.raises(ModelError, match=r"no site matches.*\['h\.\*'\].*q_proj"):
        find_sites(build("llama"), SiteSelection(include=["h.*"]))


@pytest.mark.parametrize("path", ["torch.nn.Linier", "nowhere.Linear", "Linear", "torch.nn.Conv1d"])
def test_module_types_must_be_linear_layers(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        find_sites(build("llama"), SiteSelection(module_types=[path]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_weight_is_named(value: float) -> None:
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[2, 3] = value
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj"):
        find_sites(model, SiteSelection())
