"""The plan of a compressed model: each site's rank and predicted loss; saved as plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from iosvd.budget import ENTRY_BITS, Budget, Shape
from iosvd.models.sites import layer_and_role
from iosvd.system.json_files import write_json
from iosvd.types import Spectrum

if TYPE_CHECKING:
    import pandas

    from iosvd.types import Stored


@dataclass(frozen=True)
class SitePlan:
    """The rank of one site (its full rank if it stays dense) and its predicted loss.

    Predictions cover truncation and rounding, before any correction.
    """

    out_features: int
    in_features: int
    rank: int
    dense: bool
    bits: int  # Stored for its weight or factors; an entry of the model's dtype counts as 16.
    rounded_rows: int  # Rows in int8 or less.
    rows: int  # All rows of its matrices; 0 where none is quantised.
    rounding_loss: float  # Predicted, in the units of half the dropped energy.
    dropped_energy: float  # Σ σ² of the dropped components: squared error in the metrics.
    loss_change: float | None  # First-order change of the loss, nats per token; None: no score.
    damping_output: float  # Relative damping that the roots needed.
    damping_input: float
    added_bias: bool  # Whether a correction gave it one.
    # Of keys and values, for the tokens whose cache counts; 16 an entry. Earlier plans lack it.
    cache_bits: int = 0

    @property
    def entries(self) -> int:
        """Parameters kept."""
        shape = Shape(self.out_features, self.in_features, self.added_bias)
        return shape.entries if self.dense else shape.entries_at(self.rank)


@dataclass(frozen=True)
class Plan:
    """The ranks of a model under a budget, counted in bits of the target sites."""

    ratio_asked: float
    bits_kept: int  # With the cache, if its tokens count.
    bits_total: int  # 16 for every parameter of the target sites, and for every entry of the cache.
    parameters_kept: int
    parameters_total: int
    # ½ Σ σ² of dropped components plus the loss of rounding, nats per token; None: not predicted.
    predicted_kl: float | None
    sites: Mapping[str, SitePlan]

    @property
    def ratio_achieved(self) -> float:
        """Bits kept / 16 bits for every parameter of the target sites and entry of the cache."""
        return self.bits_kept / self.bits_total

    @property
    def predicted_loss_change(self) -> float | None:
        """First-order change of the calibration loss, nats per token; None: not scored."""
        changes = [s.loss_change for s in self.sites.values() if s.loss_change is not None]
        return sum(changes) if changes else None

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the sites that are factorised."""
        return {name: site.rank for name, site in self.sites.items() if not site.dense}

    def write(self, path: Path, versions: Mapping[str, str]) -> None:
        """Write plan.json."""
        record: dict[str, Any] = {"ratio_achieved": self.ratio_achieved, **asdict(self)}
        write_json(path, {**record, "versions": dict(versions)})


def make_plan(
    ranks: Mapping[str, int],
    spectra: Mapping[str, Spectrum],
    budget: Budget,
    kl: bool,
    stored: Mapping[str, Stored] = MappingProxyType({}),
) -> Plan:
    """Complete an allocation's ranks: sites above break-even stay dense; count the bits of all.

    Args:
        ranks: what the allocation chose.
        spectra: of all sites.
        budget: of the goal.
        kl: whether the whitening's output metric is the KL curvature.
        stored: the sites that were quantised.
    """
    sites = {
        name: _site_plan(name, rank, spectra[name], budget, stored.get(name))
        for name, rank in ranks.items()
    }
    kept = sum(site.bits + site.cache_bits for site in sites.values())
    assert kept <= budget.limit, "an allocation or a quantisation exceeded its budget"
    lost = sum(site.dropped_energy / 2 + site.rounding_loss for site in sites.values())
    return Plan(
        ratio_asked=budget.ratio,
        bits_kept=kept,
        bits_total=budget.total,
        parameters_kept=sum(site.entries for site in sites.values()),
        parameters_total=sum(shape.entries for shape in budget.shapes.values()),
        predicted_kl=lost if kl else None,
        sites=sites,
    )


def _site_plan(
    name: str, rank: int, spectrum: Spectrum, budget: Budget, stored: Stored | None
) -> SitePlan:
    shape, cost = budget.shapes[name], budget.costs[name]
    dense = rank > cost.break_even_rank
    kept = shape.full_rank if dense else rank
    added = shape.adds_bias and not dense
    change = spectrum.loss_change
    rounded, rows = (0, 0) if stored is None else stored.rounded
    cached = ENTRY_BITS * shape.cached_entries(shape.cached_width if dense else kept)
    bits = cost.at(kept) - cached if stored is None else stored.bits + ENTRY_BITS * shape.m * added
    return SitePlan(
        out_features=shape.m,
        in_features=shape.n,
        rank=kept,
        dense=dense,
        bits=bits,
        cache_bits=cached,
        rounded_rows=rounded,
        rows=rows,
        rounding_loss=0.0 if stored is None else stored.rounding_loss,
        dropped_energy=float((spectrum.sigma[kept:] ** 2).sum()),
        loss_change=None if change is None else float(change[kept:].sum()),
        damping_output=spectrum.damping_output,
        damping_input=spectrum.damping_input,
        added_bias=added,
    )


def plan_frame(sites: Mapping[str, Mapping[str, Any]]) -> pandas.DataFrame:
    """Return one row per site of a plan: name, layer, role, rank, share of its bits kept."""
    import pandas

    rows = []
    for name, site in sites.items():
        layer, role = layer_and_role(name)
        kept = site["bits"] / (ENTRY_BITS * site["out_features"] * site["in_features"])
        columns = {"site": name, "layer": layer, "role": role, "rank": site["rank"], "kept": kept}
        rows.append({**columns, "rounded_rows": site["rounded_rows"], "rows": site["rows"]})
    return pandas.DataFrame(rows)
