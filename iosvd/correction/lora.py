"""SVD-LLM's update of the factors by low-rank adapters (2403.07378)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.correction.base import Corrected, Correction, Given
from iosvd.errors import NumericalError, check_at_least
from iosvd.modules import LowRankLinear
from iosvd.progress import track
from iosvd.quantization.base import Site
from iosvd.replacement import low_rank_layers, replace_

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel

_FACTORS = ("left", "right")  # In the order in which they are trained.


@dataclass(frozen=True)
class Lora(Correction):
    """Train adapters of the left factors, right ones fixed; merge; then the other way round.

    Rank, learning rate and epochs are the paper's (METHODS 7). It trains on Alpaca; here it is the
    calibration set, so that every method sees the same text. Merged, the factors have the ranks
    that they had.
    """

    rank: int = 8
    alpha: float = 16.0  # Adapters are scaled by alpha / rank.
    learning_rate: float = 1e-4
    epochs: int = 2
    batch_windows: int = 8  # Per step.
    seed: int = 0  # Of the adapters and of the order of the windows.

    def __post_init__(self) -> None:
        names = ("rank", "epochs", "batch_windows")
        check_at_least(1, **{name: getattr(self, name) for name in names})
        check_at_least(0, alpha=self.alpha, learning_rate=self.learning_rate)

    def __call__(self, given: Given) -> Corrected:
        replace_(given.model, given.sites)
        with torch.random.fork_rng(), _as_two_layers(given.model) as pairs:
            torch.manual_seed(self.seed)
            for factor in _FACTORS:
                self._train(given.model, [f"{name}.{factor}" for name in pairs], given.tokens)
        return Corrected(_Updated(given), given.sites.ranks)

    def _train(self, model: PreTrainedModel, targets: list[str], tokens: Tensor) -> None:
        """Train adapters of the named layers, and merge them."""
        from peft import LoraConfig, get_peft_model  # Imports much.

        if not targets:
            return
        asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
        options = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets)  # type: ignore[arg-type]
        adapted = get_peft_model(model, options)
        try:
            self._steps(adapted, tokens)
        finally:
            adapted.merge_and_unload()
            for parameter, wanted in asked.items():
                parameter.requires_grad_(wanted)

    def _steps(self, model: nn.Module, tokens: Tensor) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        batches = [
            batch
            for _ in range(self.epochs)
            for batch in torch.randperm(len(tokens)).split(self.batch_windows)
        ]
        device = next(model.parameters()).device
        with torch.enable_grad():
            for batch in track(batches, len(batches), "adapters", "step"):
                windows = tokens[batch].to(device)
                loss = model(input_ids=windows, labels=windows, use_cache=False).loss
                if not math.isfinite(loss.item()):
                    raise NumericalError(
                        "the loss of the adapters is not finite; lower correction.learning_rate"
                    )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()


@contextmanager
def _as_two_layers(model: PreTrainedModel) -> Iterator[Mapping[str, LowRankLinear]]:
    """Put two linear layers in place of each low-rank one, as adapters know no others.

    They are the factors themselves, so what is merged into one is merged into the other.
    """
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, _TwoLayers(layer))
    try:
        yield layers
    finally:
        for name, layer in layers.items():
            pair = model.get_submodule(name)
            assert isinstance(pair, _TwoLayers)
            with torch.no_grad():
                layer.weight.copy_(pair.right.weight)
                layer.left.copy_(pair.left.weight)
            model.set_submodule(name, layer)


class _TwoLayers(nn.Module):
    """y = left (right x), with the low-rank layer's own tensors."""

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.right = _linear(layer.weight, None)
        self.left = _linear(layer.left, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.left(self.right(x))
        return found


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer


class _Updated(Mapping[str, Site]):
    """The sites with the factors that were trained, and the metrics of those before."""

    def __init__(self, given: Given) -> None:
        self._given = given

    def __getitem__(self, name: str) -> Site:
        site, layer = self._given.sites[name], self._given.model.get_submodule(name)
        if site.factors is None or not isinstance(layer, LowRankLinear):
            return site
        kept = replace(site.factors, left=layer.left.data, right=layer.weight.data)
        return replace(site, factors=kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given.sites)

    def __len__(self) -> int:
        return len(self._given.sites)
