"""Try ranks on the calibration set: the weights are truncated for a forward pass and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from iosvd.budget import Budget
from iosvd.evaluation.perplexity import mean_loss, summed_loss
from iosvd.keys import Keys
from iosvd.prefixes import Prefixes, remember
from iosvd.stages import Stage
from iosvd.store import Store, get_or_compute
from iosvd.types import Needs, Spectrum

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class KeptLosses:
    """Losses that were measured before, by anyone who tried the same ranks of the same spectra."""

    store: Store
    keys: Keys
    needs: Needs  # The whitening's.
    elsewhere: list[Stage] = field(default_factory=list)  # What those took that were there already.

    def of(self, ranks: Mapping[str, int], windows: int, measure: Callable[[], float]) -> float:
        """Return the loss with these ranks on the first so many windows; if need be, measure it."""
        key = self.keys.trial(self.needs, ranks, windows)
        entry, now = get_or_compute(
            self.store,
            key,
            self.keys.trials(self.needs),
            lambda: {"loss": torch.tensor(measure(), dtype=torch.float64)},
        )
        if not now:
            self.elsewhere.append(entry.cost)
        return float(entry.tensors["loss"])


@dataclass(frozen=True)
class CalibrationTrial:
    """The dense model, the spectra of its sites, and the calibration set (`allocation.Trial`)."""

    model: PreTrainedModel
    sites: Mapping[str, nn.Linear]
    spectra: Mapping[str, Spectrum]
    budget: Budget
    calibration: Tensor  # (windows, length)
    batch_size: int
    kept: KeptLosses | None = None
    _remembered: dict[int, Prefixes] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the calibration set."""
        return self.calibration.numel()

    @property
    def windows(self) -> int:
        """Windows of the calibration set."""
        return len(self.calibration)

    def gated_loss(self, gates: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Return the calibration loss with each component multiplied by its gate."""
        batch = self.calibration[chosen].to(self.model.device)
        with torch.enable_grad(), gated(self.sites, self.spectra, gates):
            logits = self.model(input_ids=batch, use_cache=False).logits
            labels = batch[:, 1:].to(logits.device)
            return summed_loss(logits, labels).cpu() / labels.numel()

    def loss(self, ranks: Mapping[str, int], windows: int) -> float:
        """Return the calibration loss, nats per token, with these ranks; other sites stay dense.

        Raises:
            NumericalError: it is not finite.
        """
        chosen = self.calibration[:windows] if windows else self.calibration
        costs = self.budget.costs
        factorised = {s: rank for s, rank in ranks.items() if rank <= costs[s].break_even_rank}

        def measure() -> float:
            prefixes = self._prefixes(windows)
            first = prefixes.first_changed(self.sites[site] for site in factorised)
            with truncated_weights(self.sites, self.spectra, factorised):
                return mean_loss(
                    self.model, chosen, self.batch_size, context=partial(prefixes.from_block, first)
                )

        return measure() if self.kept is None else self.kept.of(factorised, len(chosen), measure)

    def _prefixes(self, windows: int) -> Prefixes:
        """Return what the dense model's blocks put out, computed at the first trial."""
        if windows not in self._remembered:
            chosen = self.calibration[:windows] if windows else self.calibration
            self._remembered[windows] = remember(self.model, chosen, self.batch_size)
        return self._remembered[windows]


@contextmanager
def truncated_weights(
    sites: Mapping[str, nn.Linear], spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]
) -> Iterator[None]:
    """Give these sites the weights W_k of their ranks, and their own back at the end.

    Only pointers move: the dense weights stay where they are.
    """
    dense = {site: sites[site].weight.data for site in ranks}
    try:
        for site, rank in ranks.items():
            spectrum, device = spectra[site], dense[site].device
            left, right = spectrum.left[:, :rank].to(device), spectrum.right[:rank].to(device)
            sites[site].weight.data = (left @ right).to(dense[site].dtype)
        yield
    finally:
        for site, weight in dense.items():
            sites[site].weight.data = weight


@contextmanager
def gated(
    sites: Mapping[str, nn.Linear], spectra: Mapping[str, Spectrum], gates: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let these sites compute left (gate ⊙ (right x)), with the first components of spectra."""

    def forward(site: nn.Linear, name: str, x: Tensor) -> Tensor:
        place = (x.device, x.dtype)
        spectrum, count = spectra[name], len(gates[name])
        left, right = spectrum.left[:, :count].to(*place), spectrum.right[:count].to(*place)
        return linear(linear(x, right) * gates[name].to(*place), left, site.bias)

    before = {name: vars(sites[name]).get("forward") for name in gates}
    try:
        for name in gates:
            sites[name].forward = partial(forward, sites[name], name)  # type: ignore[method-assign]
        yield
    finally:
        for name in gates:
            vars(sites[name]).pop("forward", None)
            if (own := before[name]) is not None:  # A hook of those who placed the layer.
                sites[name].forward = own  # type: ignore[method-assign]
