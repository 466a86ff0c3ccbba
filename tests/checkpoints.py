"""Small compressed models, saved, and ways to damage them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import build
from torch import Tensor
from transformers import PreTrainedModel

import iosvd
from iosvd.allocation import Spectral
from iosvd.correction import Correction, NoCorrection
from iosvd.layers.int8 import Code
from iosvd.method import Method
from iosvd.pipeline import Compressed, compress
from iosvd.quantization import (
    Axis,
    Half,
    LossAwareRemap,
    NoQuantization,
    Quantization,
    RankBudget,
    Remap,
    RoundToNearest,
)
from iosvd.whitening import InputOutput

TOKENS = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(1))


def compressed(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = NoQuantization(),  # noqa: B008 (frozen)
    ratio: float = 0.6,
    correction: Correction = NoCorrection(),  # noqa: B008 (frozen)
) -> Compressed:
    return compress(
        build(family, dtype),
        TOKENS,
        ratio=ratio,
        method=Method(InputOutput(), Spectral(), correction, quantization),
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


MIXED = LossAwareRemap(rank_budget=RankBudget.fixed, rank_ratio=0.8)  # Factors, dense, both kinds.
QUANTIZATIONS = [Half(Axis.channel), Half(Axis.output), Remap(Code.dynamic), MIXED,
                 RoundToNearest(8)]  # fmt: skip


def saved(folder: Path, quantization: Quantization = NoQuantization()) -> Path:  # noqa: B008
    result = compressed(quantization=quantization)
    iosvd.save(result.model, folder / "model", result.plan)
    return folder / "model"


def described(folder: Path) -> dict[str, Any]:
    """What config.json says of the compressed layers."""
    config = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]  # type: ignore[no-any-return]


def change_config(folder: Path, *path: str, value: Any) -> None:
    """Change one value of what config.json says of the compressed layers."""
    config = json.loads((folder / "config.json").read_text())
    node = config["quantization_config"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def first_site(folder: Path) -> tuple[str, int]:
    return next(iter(described(folder)["ranks"].items()))


def load(folder: Path) -> PreTrainedModel:
    return iosvd.load_model(iosvd.Model("damaged", path=str(folder)))
