"""The statistics of sites, each collected once: those that a store has are not collected again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iosvd.budget import Shape
from iosvd.cache.keys import Keys
from iosvd.cache.store import Entry, Key, Store
from iosvd.models.sites import shared_inputs
from iosvd.statistics.collect import collect
from iosvd.statistics.memory import MemoryUse, groups_within
from iosvd.statistics.needs import OF_INPUT, Needs, SiteStatistics, statistics_for
from iosvd.system.logs import of_stage
from iosvd.system.timing import Stage, measured

log = logging.getLogger(__name__)
if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Gathered:
    """The statistics of some sites, and what each part of them took."""

    statistics: dict[str, SiteStatistics]
    costs: Mapping[tuple[str, str], Stage]  # By the field of `Needs`, and the site.
    collected: bool  # Whether any was collected now.

    def cost(self, name: str, parts: Iterable[str]) -> Stage:
        """Return what these parts of a site's statistics took."""
        costs = [self.costs[part, name] for part in parts]
        peak = max((cost.peak_bytes for cost in costs), default=0)
        return Stage(sum(cost.seconds for cost in costs), peak)


@dataclass(frozen=True)
class Gatherer:
    """A model, its calibration windows, and where their statistics are kept."""

    model: PreTrainedModel
    tokens: Tensor  # (windows, length)
    gradient_tokens: Tensor | None  # Windows of the gradient, if they are others.
    sites: Mapping[str, nn.Linear]
    batch_size: int
    memory: MemoryUse
    store: Store
    keys: Keys

    @cached_property
    def shared(self) -> dict[str, str]:
        """Each site, and the first one that reads the same tensor."""
        return shared_inputs(self.model, self.tokens, self.sites)

    def __call__(self, names: Iterable[str], needs: Needs) -> Gathered:
        """Return the statistics of the named sites.

        What is missing is collected together, in one pass over the calibration set unless the
        gradient has windows of its own. A value does not hang on what it was collected with.
        """
        names, parts = list(names), needs.parts()
        with self.store.locked(self.keys.statistic(part, one) for part, one in parts.items()):
            found = {part: self._kept(part, one, names) for part, one in parts.items()}
            missing = {
                part: lacking
                for part, entries in found.items()
                if (lacking := self._lacking(part, names, entries))
            }
            self._collect(missing, parts, found)
        statistics = {name: self._statistics(name, found) for name in names}
        return Gathered(statistics, self._costs(names, found), bool(missing))

    def in_passes(self, needs: Needs) -> dict[str, SiteStatistics]:
        """Return the statistics of all sites in main memory, by as many passes as they need."""
        main_memory = torch.device("cpu")
        found: dict[str, SiteStatistics] = {}
        for group in self.groups(self.sites, needs):
            gathered = self(group, needs).statistics
            found |= {name: statistics.to(main_memory) for name, statistics in gathered.items()}
        return found

    def groups(self, names: Iterable[str], needs: Needs) -> list[list[str]]:
        """Divide sites into those of each pass over the calibration set."""
        shapes = {name: Shape(*self.sites[name].weight.shape) for name in names}
        return groups_within(shapes, needs, self.shared, self.memory.limit_bytes)

    def _lacking(self, part: str, names: list[str], entries: Mapping[str, Entry]) -> list[str]:
        """Return the sites whose statistic is missing; of those that share it, the first."""
        first: dict[str, str] = {}
        for name in names:
            first.setdefault(self._place(part, name), name)
        return [name for place, name in first.items() if place not in entries]

    def _costs(
        self, names: list[str], found: Mapping[str, dict[str, Entry]]
    ) -> dict[tuple[str, str], Stage]:
        """Divide what was shared evenly among those that share it."""
        readers = Counter(self.shared.values())
        costs = {}
        for part, entries in found.items():
            for name in names:
                cost = entries[self._place(part, name)].cost
                share = readers[self.shared[name]] if part in OF_INPUT else 1
                costs[part, name] = Stage(cost.seconds / share, cost.peak_bytes)
        return costs

    def _kept(self, part: str, needs: Needs, names: list[str]) -> dict[str, Entry]:
        places = dict.fromkeys(self._place(part, name) for name in names)
        kept = {place: self.store.get(self._key(part, needs, place)) for place in places}
        return {place: entry for place, entry in kept.items() if entry is not None}

    def _collect(
        self,
        missing: Mapping[str, list[str]],
        parts: Mapping[str, Needs],
        found: Mapping[str, dict[str, Entry]],
    ) -> None:
        """Collect what is missing, and add it to what was found."""
        apart = {"gradient_windows"} & set(missing) if self.gradient_tokens is not None else set()
        for chosen in (set(missing) - apart, apart):
            if not chosen:
                continue
            needs = Needs()
            for part in chosen:
                needs = needs | parts[part]
            tokens = self.tokens if chosen != apart else self.gradient_tokens
            assert tokens is not None
            sites = {s: self.sites[s] for s in self.sites if any(s in missing[p] for p in chosen)}
            with of_stage("statistics"):
                with measured() as took:
                    collected = collect(
                        self.model,
                        tokens,
                        sites,
                        needs,
                        self.batch_size,
                        on_cpu=self.memory.metrics_on_cpu,
                        checkpoint_blocks=self.memory.checkpoint_blocks,
                    )
                log.info("%d sites: %.1f s", len(sites), took().seconds)
            self._keep(collected, {part: missing[part] for part in chosen}, parts, took(), found)

    def _keep(
        self,
        collected: dict[str, SiteStatistics],
        missing: Mapping[str, list[str]],
        parts: Mapping[str, Needs],
        took: Stage,
        found: Mapping[str, dict[str, Entry]],
    ) -> None:
        """Put what was collected, and let go of it site by site."""
        count = sum(map(len, missing.values()))
        cost = Stage(took.seconds / count, took.peak_bytes)  # Every part has paid the same.
        for part, name in ((part, name) for part, names in missing.items() for name in names):
            place = self._place(part, name)
            tensors = {f: collected[name].need(f) for f in statistics_for(part)}
            key = self._key(part, parts[part], place)
            found[part][place] = self.store.put(key, Entry(tensors, cost))
            let_go: dict[str, Any] = dict.fromkeys(statistics_for(part))
            collected[name] = replace(collected[name], **let_go)

    def _statistics(self, name: str, found: Mapping[str, dict[str, Entry]]) -> SiteStatistics:
        values: dict[str, Tensor] = {}
        for part, entries in found.items():
            values |= entries[self._place(part, name)].tensors
        return SiteStatistics(name, **values)

    def _place(self, part: str, name: str) -> str:
        """Return the site that a statistic is kept under."""
        return self.shared[name] if part in OF_INPUT else name

    def _key(self, part: str, needs: Needs, place: str) -> Key:
        return self.keys.statistic(part, needs, place)
