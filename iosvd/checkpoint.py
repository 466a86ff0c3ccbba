"""Compressed models as ordinary Hugging Face folders (ECOSYSTEM: transformers' extension point).

`config.json` holds the ranks under `quantization_config`; importing iosvd tells transformers what
they mean, so `from_pretrained` and `save_pretrained` work as for any model. Without the import,
loading fails on the factors' shapes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from iosvd.errors import CheckpointError
from iosvd.modules import LowRankLinear
from iosvd.plan import Plan
from iosvd.replacement import densify_
from iosvd.versions import library_versions

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD = "iosvd"


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """The ranks of the factorised layers, by qualified name, as config.json stores them."""

    def __init__(self, ranks: Mapping[str, int], **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.ranks = dict(ranks)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "ranks": self.ranks}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """Puts the low-rank layers in place before the weights are read, and checks them afterwards."""

    quantization_config: LowRankConfig
    requires_calibration = True  # Refuses a dense checkpoint: ranks alone compress nothing.

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, rank in self.quantization_config.ranks.items():
            found, layer = _layer(model, name)
            if not 0 < rank < min(layer.in_features, layer.out_features):
                raise CheckpointError(
                    f"config.json gives {name} rank {rank}, but the layer is"
                    f" {layer.out_features} × {layer.in_features}; save the checkpoint again"
                )
            model.set_submodule(found, LowRankLinear.like(layer, rank))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        # transformers only warns of missing tensors and leaves raw memory in their place.
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"the checkpoint has no tensor {name}; it is incomplete, save it again"
                )
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark_compressed_(model: PreTrainedModel, plan: Plan) -> None:
    """Write the ranks into the model's config, which is what makes `save_pretrained` complete."""
    model.config.quantization_config = LowRankConfig(plan.ranks)


def save(
    model: PreTrainedModel,
    folder: str | Path,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a checkpoint folder: all of it, or nothing.

    Raises:
        CheckpointError: the folder exists and is not empty, or writing fails (disk full).
    """
    with _complete_folder(Path(folder)) as target:
        model.save_pretrained(target)
        if plan is not None:
            plan.write(target / "plan.json", library_versions())
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def export_dense(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write an ordinary dense checkpoint for servers without low-rank layers; changes the model.

    It has the compressed model's quality and the dense model's size.
    """
    densify_(model)
    for holder in (model.config, model):
        for name in ("quantization_config", "hf_quantizer", "quantization_method", "is_quantized"):
            if name in vars(holder):
                delattr(holder, name)
    save(model, folder, tokenizer=tokenizer)


@contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the target and rename it when all was written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; choose another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.chmod(0o755)  # mkdtemp is private to the user.
        temporary.replace(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_write_failure(error):
            raise CheckpointError(
                f"cannot write {folder}: {error}; nothing was left behind"
            ) from error
        raise


def _is_write_failure(error: BaseException) -> bool:
    # safetensors reports a full disk as its own error, tokenizers as a plain Exception.
    return isinstance(error, OSError | SafetensorError) or type(error) is Exception


def _layer(model: nn.Module, name: str) -> tuple[str, nn.Linear]:
    """Find a linear layer and the name it has here.

    A model without head names it without the prefix of its body.
    """
    for candidate in (name, name.partition(".")[2]):
        try:
            layer = model.get_submodule(candidate) if candidate else None
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return candidate, layer
    raise CheckpointError(
        f"config.json gives a rank to {name}, but the model has no such linear layer"
    )
