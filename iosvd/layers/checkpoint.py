"""Compressed models as ordinary Hugging Face folders, through transformers' extension point.

`config.json` holds ranks and rows under `quantization_config`. After `import iosvd`, transformers
understands them: `from_pretrained` and `save_pretrained` work as for any model. Without the import,
loading fails on the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from iosvd.errors import CheckpointError, StorageError, one_line
from iosvd.layers.checkpoint_checks import check_tensors, check_values, tensors_in
from iosvd.layers.description import LowRankConfig
from iosvd.layers.folder import METHOD
from iosvd.layers.replacement import compressed_layers, densify_
from iosvd.models.attention_form import from_form_, to_form_
from iosvd.models.linear_form import from_linear_form_, to_linear_form_
from iosvd.models.sites import decoder_of
from iosvd.plan import Plan
from iosvd.system.files import remove_abandoned, written_whole
from iosvd.system.versions import library_versions

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


_ALIGNMENT = 64  # Bytes, of what torch allocates on a CPU.


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """Installs the compressed layers before the weights are read, and checks them afterwards."""

    quantization_config: LowRankConfig
    requires_calibration = True  # Refuses a dense checkpoint: ranks alone compress nothing.

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if self.quantization_config.linear_form:
            to_linear_form_(model)
        to_form_(model, decoder_of(model), self.quantization_config.form)
        stored = tensors_in(checkpoint_files or [])
        for name in self.quantization_config.layers:
            found, layer = _layer(model, name)
            new = self.quantization_config.empty(name, layer)
            if stored:
                check_tensors(name, new, stored)
            model.set_submodule(found, new)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        # transformers only warns of missing tensors and leaves their memory uninitialised.
        body = _body_of(model)
        for name, parameter in body.named_parameters():
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"the checkpoint has no tensor {name}; it is incomplete, save it again"
                )
        for parameter in model.parameters():
            # Mapped from a file at any address, where products may round otherwise than elsewhere.
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        for name, layer in compressed_layers(model).items():
            check_values(layer, name)
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and not torch.isfinite(parameter).all():
                raise CheckpointError(
                    f"{name} in the checkpoint has NaN or infinity; save the checkpoint again"
                )
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: nn.Module
    ) -> list[Any]:
        """Let tensors have the names that they have in the model (`mark_compressed_`)."""
        own = self.quantization_config.linear_form
        return [] if own else super().update_weight_conversions(weight_conversions, model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        to_dense_(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # Else transformers' Trainer asks for adapters.

    @property
    def is_compileable(self) -> bool:
        return True


def mark_compressed_(model: PreTrainedModel) -> None:
    """Describe the layers in the model's config, so that `save_pretrained` is complete.

    Tensors are saved under their names in the model: transformers would rename those of some
    architectures, and merge those of experts, as older files of dense models have them.
    """
    model.config.quantization_config = LowRankConfig.of(model)
    model._weight_conversions = []  # type: ignore[assignment]


def to_dense_(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Turn a compressed model into an ordinary dense one, in place.

    Raises:
        CheckpointError: it has biases that its architecture has not.
    """
    if added := LowRankConfig.of(model).biases:
        raise CheckpointError(
            f"{added[0]} has a bias that a dense {type(model).__name__} has no place for;"
            " compress with correction.bias=false"
        )
    densify_(model, dtype or model.dtype)
    from_form_(model)
    from_linear_form_(model)
    model._weight_conversions = None  # type: ignore[assignment]


def save(
    model: PreTrainedModel,
    folder: str | Path,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> None:
    """Write a checkpoint folder, completely or not at all.

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
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> None:
    """Write an ordinary dense checkpoint for servers without low-rank layers; changes the model.

    It has the compressed model's quality and the dense model's size.

    Raises:
        CheckpointError: as `save`, or the model has biases that its architecture has not.
    """
    to_dense_(model)
    for holder in (model.config, model):
        for name in ("quantization_config", "hf_quantizer", "quantization_method", "is_quantized"):
            if name in vars(holder):
                delattr(holder, name)
    save(model, folder, tokenizer=tokenizer)


@contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a partial folder beside the target; it is renamed to the target once complete."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; choose another folder or remove it")
    target = folder.resolve()  # A link stands for the folder that it leads to.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, target.name)
        with written_whole(target) as partial:
            partial.mkdir()
            yield partial
            if target.exists():
                target.rmdir()  # It is empty.
    except BaseException as error:
        if _is_write_failure(error):
            raise CheckpointError(
                f"cannot write {folder}: {one_line(error.__cause__ or error)}; nothing was left"
                " behind"
            ) from error
        raise


def _is_write_failure(error: BaseException) -> bool:
    # safetensors reports a full disk as its own error, tokenizers as a plain Exception.
    return isinstance(error, OSError | SafetensorError | StorageError) or type(error) is Exception


def _body_of(model: Any) -> nn.Module:
    """Return the part of a model whose weights a checkpoint must hold: all, or all but a new head.

    A head is new if the checkpoint was saved by another class: transformers initialises it.
    """
    saved_by = getattr(model.config, "architectures", None) or [type(model).__name__]
    return model if type(model).__name__ in saved_by else model.base_model  # type: ignore[no-any-return]


def _layer(model: nn.Module, name: str) -> tuple[str, nn.Linear]:
    """Find a linear layer and the name it has here.

    A model without a head names it without the prefix of its body.
    """
    for candidate in (name, name.partition(".")[2]):
        try:
            layer = model.get_submodule(candidate) if candidate else None
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return candidate, layer
    raise CheckpointError(f"config.json describes {name}, but the model has no such linear layer")
