"""Calibration statistics of sites; those in the store are not collected again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iosvd.cache.calibration import Calibration
from iosvd.cache.store import Entry, Key, Store
from iosvd.statistics.collect import collect
from iosvd.statistics.memory import groups_within
from iosvd.statistics.needs import OF_INPUT, Needs, SiteStatistics, statistics_for
from iosvd.system.logs import of_stage
from iosvd.system.timing import Stage, measured

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collected:
    """Statistics of some sites, and what each part of them cost."""

    statistics: dict[str, SiteStatistics]
    costs: Mapping[tuple[str, str], Stage]  # By the field of `Needs`, and the site.
    computed: bool  # Whether any of them was missing in the store.

    def cost(self, name: str, parts: Iterable[str]) -> Stage:
        """Return what these parts of a site's statistics cost."""
        costs = [self.costs[part, name] for part in parts]
        peak = max((cost.peak_bytes for cost in costs), default=0)
        return Stage(sum(cost.seconds for cost in costs), peak)


@dataclass(frozen=True)
class CachedStatistics:
    """The statistics of a calibration set, collected as they are asked for."""

    calibration: Calibration

    def __call__(self, names: Iterable[str], needs: Needs) -> Collected:
        """Return the statistics of the named sites.

        Missing ones are collected together, in one pass over the calibration set; the gradient
        takes a second pass if it has windows of its own. Each statistic is independent of the
        others collected in the same pass.
        """
        names, parts = list(names), needs.parts()
        keys = self.calibration.keys
        with self._store.locked(keys.statistic(part, one) for part, one in parts.items()):
            found = {part: self._stored(part, one, names) for part, one in parts.items()}
            missing = {
                part: lacking
                for part, entries in found.items()
                if (lacking := self._lacking(part, names, entries))
            }
            self._collect(missing, parts, found)
        statistics = {name: self._statistics(name, found) for name in names}
        return Collected(statistics, self._costs(names, found), bool(missing))

    def in_passes(self, needs: Needs) -> dict[str, SiteStatistics]:
        """Return the statistics of all sites in main memory, in as many passes as they need."""
        main_memory = torch.device("cpu")
        found: dict[str, SiteStatistics] = {}
        for group in self.groups(self.calibration.sites, needs):
            collected = self(group, needs).statistics
            found |= {name: statistics.to(main_memory) for name, statistics in collected.items()}
        return found

    def groups(self, names: Iterable[str], needs: Needs) -> list[list[str]]:
        """Divide sites into those of each pass over the calibration set."""
        calibration = self.calibration
        shapes = {name: calibration.shapes[name] for name in names}
        limit = calibration.memory.limit_bytes
        return groups_within(shapes, needs, calibration.shared_inputs, limit)

    def _lacking(self, part: str, names: list[str], entries: Mapping[str, Entry]) -> list[str]:
        """Return the sites whose statistic is missing; of those that share it, the first."""
        first: dict[str, str] = {}
        for name in names:
            first.setdefault(self._place(part, name), name)
        return [name for place, name in first.items() if place not in entries]

    def _costs(
        self, names: list[str], found: Mapping[str, dict[str, Entry]]
    ) -> dict[tuple[str, str], Stage]:
        """Divide the cost of a shared statistic equally among the sites that share it."""
        readers = Counter(self.calibration.shared_inputs.values())
        costs = {}
        for part, entries in found.items():
            for name in names:
                cost = entries[self._place(part, name)].cost
                share = readers[self.calibration.shared_inputs[name]] if part in OF_INPUT else 1
                costs[part, name] = Stage(cost.seconds / share, cost.peak_bytes)
        return costs

    def _stored(self, part: str, needs: Needs, names: list[str]) -> dict[str, Entry]:
        places = dict.fromkeys(self._place(part, name) for name in names)
        stored = {place: self._store.get(self._key(part, needs, place)) for place in places}
        return {place: entry for place, entry in stored.items() if entry is not None}

    def _collect(
        self,
        missing: Mapping[str, list[str]],
        parts: Mapping[str, Needs],
        found: Mapping[str, dict[str, Entry]],
    ) -> None:
        """Collect what is missing, and add it to `found`."""
        own = self.calibration
        apart = {"gradient_windows"} & set(missing) if own.gradient_windows is not None else set()
        for chosen in (set(missing) - apart, apart):
            if not chosen:
                continue
            needs = Needs()
            for part in chosen:
                needs = needs | parts[part]
            windows = own.windows if chosen != apart else own.gradient_windows
            assert windows is not None
            sites = {s: own.sites[s] for s in own.sites if any(s in missing[p] for p in chosen)}
            with of_stage("statistics"):
                with measured() as took:
                    collected = collect(
                        own.model,
                        windows,
                        sites,
                        needs,
                        own.batch_size,
                        on_cpu=own.memory.metrics_on_cpu,
                    )
                log.info("%d sites: %.1f s", len(sites), took().seconds)
            self._put(collected, {part: missing[part] for part in chosen}, parts, took(), found)

    def _put(
        self,
        collected: dict[str, SiteStatistics],
        missing: Mapping[str, list[str]],
        parts: Mapping[str, Needs],
        took: Stage,
        found: Mapping[str, dict[str, Entry]],
    ) -> None:
        """Store what was collected, and free it site by site."""
        count = sum(map(len, missing.values()))
        cost = Stage(took.seconds / count, took.peak_bytes)  # Divided equally.
        for part, name in ((part, name) for part, names in missing.items() for name in names):
            place = self._place(part, name)
            tensors = {f: collected[name].need(f) for f in statistics_for(part)}
            key = self._key(part, parts[part], place)
            found[part][place] = self._store.put(key, Entry(tensors, cost))
            let_go: dict[str, Any] = dict.fromkeys(statistics_for(part))
            collected[name] = replace(collected[name], **let_go)

    def _statistics(self, name: str, found: Mapping[str, dict[str, Entry]]) -> SiteStatistics:
        values: dict[str, Tensor] = {}
        for part, entries in found.items():
            values |= entries[self._place(part, name)].tensors
        return SiteStatistics(name, **values)

    def _place(self, part: str, name: str) -> str:
        """Return the site whose name a statistic is stored under."""
        return self.calibration.shared_inputs[name] if part in OF_INPUT else name

    def _key(self, part: str, needs: Needs, place: str) -> Key:
        return self.calibration.keys.statistic(part, needs, place)

    @property
    def _store(self) -> Store:
        return self.calibration.store
