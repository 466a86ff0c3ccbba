"""The description of compressed layers in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from iosvd.errors import CheckpointError, one_line
from iosvd.layers.folder import METHOD
from iosvd.layers.four_bit import FourBitLinear
from iosvd.layers.modules import StoredLinear, empty_layer
from iosvd.layers.replacement import compressed_layers
from iosvd.layers.rows import RowLayout
from iosvd.models.attention_form import Form, form_of
from iosvd.system.json_files import DamagedError, typed


@dataclass(frozen=True)
class _Description:
    """The description of the compressed layers in config.json."""

    ranks: dict[str, int]
    rows: dict[str, dict[str, dict[str, Any]]]  # Of each matrix, a `RowLayout`.
    four_bit: dict[str, int]
    biases: list[str]
    linear_form: bool
    form: str


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """How each compressed layer is stored, by qualified name, as in config.json.

    `ranks`: the factorised layers. `rows`: layers with matrices in rows of two widths, one
    `RowLayout` per matrix. `four_bit`: group sizes of layers in four bits. `biases`: layers that
    have a bias although the architecture has none. `linear_form`: whether experts and the like are
    stored as linear layers, and all tensors under the names that they have in the model. `form`:
    that of queries, keys and values, if it is not the architecture's (`attention_form.py`).
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        rows: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
        four_bit: Mapping[str, int] | None = None,
        biases: Sequence[str] | None = None,
        linear_form: bool = False,
        form: str = Form.separate.value,
        **_: Any,
    ) -> None:
        given = {
            "ranks": ranks,
            "rows": {} if rows is None else rows,
            "four_bit": {} if four_bit is None else four_bit,
            "biases": [] if biases is None else biases,
            "linear_form": linear_form,
            "form": form,
        }
        try:
            found = typed(_Description, given, "quantization_config")
            self.form = Form(found.form)
        except (DamagedError, ValueError) as error:
            raise CheckpointError(f"config.json: {error}; save the checkpoint again") from None
        self.quant_method = METHOD  # type: ignore[assignment]
        self.ranks, self.rows = found.ranks, found.rows
        self.four_bit, self.biases = found.four_bit, found.biases
        self.linear_form = found.linear_form

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
        form = form_of(model).value
        return cls(ranks, rows, four_bit, biases, linear_form=True, form=form)

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
        described |= {"linear_form": self.linear_form}
        if self.form is not Form.separate:
            described["form"] = self.form.value
        present = {key: value for key, value in described.items() if value}
        return {"quant_method": self.quant_method, "ranks": self.ranks, **present}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
