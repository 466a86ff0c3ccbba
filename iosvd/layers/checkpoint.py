"""Compressed models as ordinary Hugging Face folders, through transformers' extension point.

`config.json` holds ranks and rows under `quantization_config`. After `import iosvd`, transformers
understands them: `from_pretrained` and `save_pretrained` work as for any model. Without the import,
loading fails on the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from iosvd.errors import CheckpointError, StorageError, one_line
from iosvd.layers.checkpoint_checks import check_tensors, check_values, tensors_in
from iosvd.layers.four_bit import FourBitLinear
from iosvd.layers.modules import StoredLinear, empty_layer
from iosvd.layers.replacement import compressed_layers, densify_
from iosvd.layers.rows import RowLayout
from iosvd.plan import Plan
from iosvd.system.files import remove_abandoned, written_whole
from iosvd.system.json_files import DamagedError, typed
from iosvd.system.versions import library_versions

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD = "iosvd"


@dataclass(frozen=True)
class _Description:
    """The description of the compressed layers in config.json."""

    ranks: dict[str, int]
    rows: dict[str, dict[str, dict[str, Any]]]  # Of each matrix, a `RowLayout`.
    four_bit: dict[str, int]
    biases: list[str]


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """How each compressed layer is stored, by qualified name, as in config.json.

    `ranks`: the factorised layers. `rows`: layers with matrices in rows of two widths, one
    `RowLayout` per matrix. `four_bit`: group sizes of layers in four bits. `biases`: layers that
    have a bias although the architecture has none.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        rows: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
        four_bit: Mapping[str, int] | None = None,
        biases: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        given = {
            "ranks": ranks,
            "rows": {} if rows is None else rows,
            "four_bit": {} if four_bit is None else four_bit,
            "biases": [] if biases is None else biases,
        }
        try:
            found = typed(_Description, given, "quantization_config")
        except DamagedError as error:
            raise CheckpointError(f"config.json: {error}; save the checkpoint again") from None
        self.quant_method = METHOD  # type: ignore[assignment]
        self.ranks, self.rows = found.ranks, found.rows
        self.four_bit, self.biases = found.four_bit, found.biases

    @classmethod
    def of(cls, model: nn.Module) -> LowRankConfig:
        """Describe the compressed layers of a model."""
        ranks, rows, four_bit = {}, {}, {}
        for name, layer in compressed_layers(model).items():
            if isinstance(layer, FourBitLinear):
                four_bit[name] = layer.group
            elif isinstance(layer, StoredLinear):
                if layer.rank is not None:
                    ranks[name] = layer.rank
                if layer.layouts:
                    rows[name] = {k: layout.to_dict() for k, layout in layer.layouts.items()}
        biases = [name for name, layer in compressed_layers(model).items() if layer.added_bias]
        return cls(ranks, rows, four_bit, biases)

    @property
    def layers(self) -> list[str]:
        """Names of all compressed layers."""
        return list({**self.ranks, **self.rows, **self.four_bit})

    def empty(self, name: str, layer: nn.Linear) -> nn.Module:
        """Return the uninitialised layer that replaces a dense one.

        Raises:
            CheckpointError: config.json describes an impossible layer.
        """
        m, n, added = layer.out_features, layer.in_features, name in self.biases
        biased = layer.bias is not None or added
        device, dtype = layer.weight.device, layer.weight.dtype
        rank = self.ranks.get(name)
        if rank is not None and not 0 < rank <= min(m, n):
            raise CheckpointError(
                f"config.json gives {name} rank {rank}, but the layer is {m} × {n};"
                " save the checkpoint again"
            )
        try:
            if name in self.four_bit:
                return FourBitLinear(n, m, self.four_bit[name], biased, device, dtype)
            of_site = self.rows.get(name, {})
            layouts = {k: RowLayout.from_dict(layout) for k, layout in of_site.items()}
            new = empty_layer(n, m, rank, layouts, biased=biased, device=device, dtype=dtype)
            new.added_bias = added
            return new
        except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"config.json describes rows of {name} that cannot be ({one_line(error)});"
                " save the checkpoint again"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        described = {"rows": self.rows, "four_bit": self.four_bit, "biases": self.biases}
        present = {key: value for key, value in described.items() if value}
        return {"quant_method": self.quant_method, "ranks": self.ranks, **present}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """Installs the compressed layers before the weights are read, and checks them afterwards."""

    quantization_config: LowRankConfig
    requires_calibration = True  # Refuses a dense checkpoint: ranks alone compress nothing.

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        stored = tensors_in(checkpoint_files or [])
        for name in self.quantization_config.layers:
            found, layer = _layer(model, name)
            new = self.quantization_config.empty(name, layer)
            if stored:
                check_tensors(name, new, stored)
            model.set_submodule(found, new)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        # transformers only warns of missing tensors and leaves their memory uninitialised.
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"the checkpoint has no tensor {name}; it is incomplete, save it again"
                )
        for name, layer in compressed_layers(model).items():
            check_values(layer, name)
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and not torch.isfinite(parameter).all():
                raise CheckpointError(
                    f"{name} in the checkpoint has NaN or infinity; save the checkpoint again"
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


def mark_compressed_(model: PreTrainedModel) -> None:
    """Describe the layers in the model's config, so that `save_pretrained` is complete."""
    model.config.quantization_config = LowRankConfig.of(model)


def save(
    model: PreTrainedModel,
    folder: str | Path,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write an ordinary dense checkpoint for servers without low-rank layers; changes the model.

    It has the compressed model's quality and the dense model's size.

    Raises:
        CheckpointError: as `save`, or the model has biases that its architecture has not.
    """
    if added := LowRankConfig.of(model).biases:
        raise CheckpointError(
            f"{added[0]} has a bias that a dense {type(model).__name__} has no place for;"
            " compress with correction.bias=false"
        )
    densify_(model, model.dtype)
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
