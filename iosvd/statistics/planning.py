"""Plan bytes, passes and multiplications of a run from the shapes of its model alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from iosvd.budget import Shape
from iosvd.errors import IosvdError, one_line
from iosvd.grams import GRAM_SHARE
from iosvd.models.auto_class import auto_class_of
from iosvd.models.head import has_plain_head
from iosvd.models.loading import Model, load_config
from iosvd.models.routing import active_sites
from iosvd.models.sites import (
    SiteSelection,
    covered_share,
    decoder_blocks,
    find_linears,
    named_blocks,
    names_within,
    shared_inputs,
)
from iosvd.statistics.kl_metric import Estimator
from iosvd.statistics.memory import Activations, groups_within, statistics_bytes
from iosvd.statistics.needs import Needs
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """Multiplications per token."""

    model: float  # Forward and backward through the layers, in the model's dtype.
    sums: float  # The products that the statistics sum, in float32.

    @property
    def total(self) -> float:
        return self.model + self.sums

    def __add__(self, other: Work) -> Work:
        return Work(self.model + other.model, self.sums + other.sums)


@dataclass(frozen=True)
class Outline:
    """A model's shapes, without its weights."""

    sites: Mapping[str, Shape]
    shared: Mapping[str, str]  # Site to the first site that reads the same tensor.
    active: tuple[str, ...]  # Sites that compute for one token: not all experts do.
    blocks: tuple[tuple[str, ...], ...]  # Those of each decoder block.
    covered_share: float  # Of the decoder blocks' weights, that the sites hold.
    activations: Activations
    weight_bytes: int
    block_bytes: tuple[int, ...]  # Of the decoder blocks' weights.

    def passes(self, needs: Needs, limit_bytes: float) -> list[int]:
        """Return the bytes of the sums in each pass over the calibration set."""
        if needs == Needs():
            return []
        groups = groups_within(self.sites, needs, self.shared, limit_bytes)
        shapes = ({name: self.sites[name] for name in group} for group in groups)
        return [statistics_bytes(group, needs, self.shared) for group in shapes]

    @property
    def visiting_bytes(self) -> int:
        """Bytes of weights on the device if decoder blocks visit it one at a time."""
        return self.weight_bytes - sum(self.block_bytes) + max(self.block_bytes)

    @property
    def forward(self) -> int:
        """Multiplications of a forward pass through the linear layers, per token."""
        return self.body + self.head

    @property
    def body(self) -> int:
        """Multiplications of the sites alone."""
        return sum(self.sites[name].entries for name in self.active)

    @property
    def head(self) -> int:
        """Multiplications of the head alone."""
        return self.activations.hidden * self.activations.vocabulary

    @property
    def groups(self) -> list[list[list[Shape]]]:
        """The active sites of every decoder block, grouped by the tensor that they read."""
        return [self._grouped(names) for names in self.blocks]

    def _grouped(self, names: Iterable[str]) -> list[list[Shape]]:
        found: dict[str, list[Shape]] = {}
        for name in names:
            found.setdefault(self.shared[name], []).append(self.sites[name])
        return list(found.values())

    def statistics(self, needs: Needs, length: int) -> Work:
        """Return the work of collecting all statistics once, per token.

        Attention, norms and the softmax are not counted.

        Args:
            needs: what is collected.
            length: of a calibration window.
        """
        if needs == Needs():
            return Work(0, 0)
        passes, kl = max(1, needs.kronecker_passes), needs.kl_metric
        sampled = needs.fisher_metric is not None and needs.fisher_metric.sampled
        # One backward pass and one product per probe, or per top-K token.
        probes = 0 if kl is None else kl.probes if kl.estimator is Estimator.probe else kl.top_k
        backward = probes + sampled + needs.true_loss * passes
        weighed = (needs.gradient_windows > 0) + needs.every_gradient * passes
        shapes = [self.sites[name] for name in self.active]
        products = float(weighed * self.body)
        readers = {self.shared[name] for name in self.active}
        grams = needs.input_metric * sum(self.sites[name].n ** 2 for name in readers)
        grams += (probes + (needs.fisher_metric is not None)) * sum(s.m**2 for s in shapes)
        products += GRAM_SHARE * grams
        if needs.kronecker_passes:  # G A Gᵀ or Gᵀ B G, once a window.
            products += passes * sum(s.m * s.n * (s.m + s.n) for s in shapes) / length
        if not backward:  # No logits are needed.
            return Work(passes * self.body, products)
        # The blocks run forward once more on the way back.
        return Work((passes + backward) * self.forward + passes * self.body, products)

    @property
    def spectra_bytes(self) -> int:
        """Bytes of all components of all sites in float32, in the cache."""
        return sum(4 * s.full_rank * (s.m + s.n) for s in self.sites.values())


def outline(model: Model, tokens: int) -> Outline:
    """Return the shapes of a model from its configuration; no weight is loaded.

    Args:
        model: which.
        tokens: of a batch.
    """
    import transformers

    config = load_config(model)
    with torch.device("meta"):
        empty = getattr(transformers, auto_class_of(config)).from_config(
            config,
            dtype=model.dtype.torch,
            trust_remote_code=model.trust_remote_code,
            attn_implementation="eager",  # Other implementations look at values.
        )
    return outline_of(empty.eval(), model.sites, tokens)


def outline_of(model: PreTrainedModel, selection: SiteSelection, tokens: int) -> Outline:
    """Return the shapes of a loaded model, also on the meta device."""
    sites = find_linears(model, selection)
    few = Windows(torch.zeros(1, 8, dtype=torch.long))
    active = active_sites(model, sites)
    return Outline(
        sites={name: Shape(*site.weight.shape) for name, site in sites.items()},
        shared=_shared_inputs(model, few, sites),
        active=tuple(active),
        blocks=tuple(tuple(names_within(x, active).values()) for x in named_blocks(model)),
        covered_share=covered_share(model, sites),
        activations=activations_of(model, selection, tokens),
        weight_bytes=_bytes(model),
        block_bytes=tuple(map(_bytes, decoder_blocks(model))),
    )


def _shared_inputs(
    model: PreTrainedModel, windows: Windows, sites: Mapping[str, nn.Linear]
) -> dict[str, str]:
    """Return `shared_inputs`; each site alone if the model cannot run without values."""
    try:
        return shared_inputs(model, windows, sites)
    except IosvdError:
        raise
    # Whatever a model's own code raises when it looks at values of the meta device.
    except Exception as error:  # noqa: BLE001
        log.info(
            "this architecture runs with values only, so inputs that layers share (q, k, v) are"
            " counted for each: the plan is an upper bound (%s)",
            one_line(error)[:100],
        )
        return {name: name for name in sites}


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def activations_of(model: PreTrainedModel, selection: SiteSelection, tokens: int) -> Activations:
    """Return the activations of a batch of this many tokens."""
    sites = find_linears(model, selection)
    linears = {sites[name] for name in active_sites(model, sites)}
    blocks = [
        tuple(Shape(*m.weight.shape) for m in block.modules() if m in linears)
        for block in decoder_blocks(model)
    ]
    # A model without a list of blocks keeps all of its activations.
    everything = tuple(Shape(*linear.weight.shape) for linear in linears)
    config = model.config.get_text_config()
    return Activations(
        shapes=tuple(block for block in blocks if block) or (everything,),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        tokens=tokens,
        entry_bytes=model.dtype.itemsize,
        separate_head=has_plain_head(config) and model.get_output_embeddings() not in linears,
    )
