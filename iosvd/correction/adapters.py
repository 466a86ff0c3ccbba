"""Train low-rank adapters of the compressed layers and merge them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iosvd.cache.calibration import Calibration
from iosvd.errors import NumericalError, check_at_least, extra
from iosvd.layers.modules import LowRankLinear
from iosvd.layers.replacement import low_rank_layers
from iosvd.models.blocks import checkpointed
from iosvd.system.progress import track
from iosvd.types import Site
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

FACTORS = ("left", "right")
_WARM_UP = 0.1  # Share of the steps; afterwards the learning rate falls along a cosine.


@dataclass(frozen=True)
class Loss:
    """A mean over tokens, to be minimised."""

    summed: Callable[[PreTrainedModel, Windows], Tensor]
    terms: Callable[[Windows], Tensor]  # The number of terms of the sum, by window.


@dataclass(frozen=True)
class Training:
    """Options of adapter training: AdamW on the calibration windows in random order."""

    rank: int
    alpha: float  # Adapters are scaled by alpha / rank.
    learning_rate: float
    epochs: int
    batch_windows: int  # Per step.

    def __post_init__(self) -> None:
        names = ("rank", "epochs", "batch_windows")
        check_at_least(1, **{name: getattr(self, name) for name in names})
        check_at_least(0, alpha=self.alpha, learning_rate=self.learning_rate)

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("peft",)

    def train_and_merge(
        self,
        model: PreTrainedModel,
        layers: Sequence[str],
        calibration: Calibration,
        windows: Windows,
        loss: Loss,
        accept: Callable[[], bool] | None = None,
    ) -> None:
        """Train adapters of the named linear layers, and merge them into the layers.

        Adapters start at zero, in float32 whatever the model's dtype, and are drawn from torch's
        global generator.

        Args:
            model: only the named layers are changed.
            layers: qualified names.
            calibration: batch size and memory limits.
            windows: that are trained on.
            loss: to be minimised.
            accept: called after the merge; if it returns False, the layers are restored.

        Raises:
            NumericalError: the loss is not finite.
        """
        with extra("peft"):
            from peft import LoraConfig, get_peft_model  # Slow to import.

        if not layers:
            return
        before = {
            name: _weight(model, name).detach().to("cpu", copy=True)
            for name in (layers if accept else ())
        }
        asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
        options = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(layers))  # type: ignore[arg-type]
        adapted = get_peft_model(model, options)
        trained = False
        try:
            with checkpointed(model, calibration.memory.checkpoint_blocks):
                self._steps(adapted, windows, loss, calibration.batch_size)
            trained = True
        finally:
            _ = adapted.merge_and_unload() if trained else adapted.unload()
            for parameter, wanted in asked.items():
                parameter.requires_grad_(wanted)
        if accept and not accept():
            with torch.no_grad():
                for name, weight in before.items():
                    _weight(model, name).copy_(weight)

    def _steps(self, model: Any, windows: Windows, loss: Loss, batch_size: int) -> None:
        from transformers import get_cosine_schedule_with_warmup

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        batches = [
            batch
            for _ in range(self.epochs)
            for batch in torch.randperm(len(windows)).split(self.batch_windows)
        ]
        warm_up = min(math.ceil(_WARM_UP * len(batches)), len(batches) - 1)
        schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, len(batches))
        terms = loss.terms(windows)
        with torch.enable_grad():
            for batch in track(batches, len(batches), "adapters", "step"):
                for part in batch.split(batch_size):
                    found = loss.summed(model, windows[part])
                    if not math.isfinite(found.item()):
                        raise NumericalError(
                            "the loss of the adapters is not finite; lower correction.learning_rate"
                        )
                    # Of the sum over tokens: those of the mean underflow in half precision.
                    found.backward()
                for parameter in trained:
                    if parameter.grad is not None:  # None: of an expert without a token.
                        parameter.grad /= int(terms[batch].sum())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def _weight(model: nn.Module, layer: str) -> nn.Parameter:
    return model.get_parameter(f"{layer}.weight")


@contextmanager
def as_two_layers(model: nn.Module) -> Iterator[Mapping[str, LowRankLinear]]:
    """Put two linear layers, `FACTORS`, in place of each low-rank layer, because peft adapts those.

    They share the tensors of the low-rank layer.
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
    """y = left (right x), on the tensors of a low-rank layer."""

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


def sites_of(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """Return sites with the weights and factors that a compressed model holds now."""
    return {name: _site_of(model.get_submodule(name), sites[name]) for name in sites}


def _site_of(layer: nn.Module, site: Site) -> Site:
    if site.factors is None:
        assert isinstance(layer, nn.Linear)
        return replace(site, weight=layer.weight)
    assert isinstance(layer, LowRankLinear)
    factors = replace(site.factors, left=layer.left.data, right=layer.weight.data)
    return replace(site, factors=factors, weight=site.weight.detach().to("meta"))
