"""A dense model and its calibration windows: the input of every method, built once per run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.budget import Shape
from iosvd.cache.keys import CacheKeys
from iosvd.cache.store import NoStore, Store
from iosvd.errors import ConfigError, ModelError
from iosvd.layers.replacement import compressed_layers
from iosvd.models.routing import without_idle_experts
from iosvd.models.sites import SiteSelection, covered_share, find_sites, shared_inputs
from iosvd.statistics.memory import MemoryUse
from iosvd.windows import Windows, as_windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
_MOST = 0.9  # Of the weights of the decoder blocks; a smaller share is worth a warning.


@dataclass(frozen=True)
class Calibration:
    """A dense model, its target layers, and the windows that calibrate it.

    Use `Calibration.of`, which checks the model.
    """

    model: PreTrainedModel
    sites: Mapping[str, nn.Linear]  # Target layers by qualified name.
    windows: Windows
    gradient_windows: Windows | None = None  # Of the loss gradient; None: the same.
    batch_size: int = 8  # Windows per forward pass.
    memory: MemoryUse = MemoryUse()  # noqa: RUF009 (frozen)
    store: Store = NoStore()  # noqa: RUF009 (frozen)
    identity: str = ""  # Tells the model's weights from all others in the store.

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokens: Tensor | Windows,
        *,
        selection: SiteSelection = SiteSelection(),  # noqa: B008 (frozen)
        gradient_tokens: Tensor | Windows | None = None,
        batch_size: int = 8,
        memory: MemoryUse = MemoryUse(),  # noqa: B008 (frozen)
        store: Store = NoStore(),  # noqa: B008 (frozen)
        identity: str = "",
    ) -> Calibration:
        """Find the target layers of a dense model and check that they can be compressed.

        Args:
            model: a causal language model.
            tokens: calibration windows (windows, length), or those of images and text.
            selection: which layers are targets.
            gradient_tokens: windows of the loss gradient; None: the same windows.
            batch_size: windows per forward pass.
            memory: limits on the memory of statistics; a lower limit takes more passes over the
                calibration set, each for some of the sites.
            store: keeps statistics, spectra and losses so that each is computed once; see `Cache`.
            identity: tells the model's weights from those of other models in the store.

        Raises:
            ConfigError: the store needs an identity.
            ModelError: the model is compressed already, or no layer matches.
            NumericalError: a weight is not finite.
        """
        if store.keeps and not identity:
            raise ConfigError(
                "a store needs identity=…, which tells this model's weights from those of others"
                " in it"
            )
        check_dense(model)
        # For every method, so that ratios of all refer to the same layers.
        windows = as_windows(tokens)
        sites = without_idle_experts(model, windows, find_sites(model, selection), batch_size)
        calibration = cls(
            model=model,
            sites=sites,
            windows=windows,
            gradient_windows=None if gradient_tokens is None else as_windows(gradient_tokens),
            batch_size=batch_size,
            memory=memory,
            store=store,
            identity=identity,
        )
        if calibration.covered_share < _MOST:
            log.warning(
                "the sites hold %.0f%% of the weights of the decoder blocks; ratios refer to these"
                " alone, and the others stay as they are",
                100 * calibration.covered_share,
            )
        return calibration

    @cached_property
    def covered_share(self) -> float:
        """The share of the dense decoder blocks' weights that the sites hold."""
        return covered_share(self.model, self.sites)

    @cached_property
    def shared_inputs(self) -> Mapping[str, str]:
        """Each site, and the first site that reads the same tensor."""
        return shared_inputs(self.model, self.windows, self.sites)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each site's weight, (out, in)."""
        return {name: Shape(*site.weight.shape) for name, site in self.sites.items()}

    def device_of(self, site: str) -> torch.device:
        """Return the device where a site is factorised: a weight may live in main memory."""
        home = self.sites[site].weight.device
        return self.model.device if home.type == "cpu" else home

    @cached_property
    def keys(self) -> CacheKeys:
        """The cache keys of this model and these windows."""
        return CacheKeys.of(self.identity, self.windows, self.gradient_windows)


def check_dense(model: PreTrainedModel) -> None:
    """Raise ModelError if a model is compressed already."""
    if compressed_layers(model):
        raise ModelError("this model is compressed already; start from the dense one")
