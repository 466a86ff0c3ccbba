"""What is to be done to every site, and what it is predicted to cost; saved as plan.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iosvd.budget import Budget
from iosvd.types import Spectrum

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class SitePlan:
    """The rank of one site (its full rank if it stays dense) and what is lost by it."""

    out_features: int
    in_features: int
    rank: int
    dense: bool
    dropped_energy: float  # Σ σ² of the dropped components: squared error in the metrics.
    loss_change: float | None  # Its first-order counterpart, nats per token, if a gradient was had.
    damping_output: float  # Relative damping that the roots needed.
    damping_input: float


@dataclass(frozen=True)
class Plan:
    """The ranks of a model under a budget, counted in parameters of the target sites."""

    ratio_asked: float
    parameters_kept: int
    parameters_total: int
    predicted_kl: float | None  # ½ Σ σ² in nats per token, where the output metric is KL's.
    sites: Mapping[str, SitePlan]

    @property
    def ratio_achieved(self) -> float:
        """Parameters kept / parameters of all target sites."""
        return self.parameters_kept / self.parameters_total

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the sites that are factorised."""
        return {name: site.rank for name, site in self.sites.items() if not site.dense}

    def write(self, path: Path, versions: Mapping[str, str]) -> None:
        """Write plan.json."""
        record: dict[str, Any] = {"ratio_achieved": self.ratio_achieved, **asdict(self)}
        path.write_text(json.dumps({**record, "versions": dict(versions)}, indent=1) + "\n")


def make_plan(
    ranks: Mapping[str, int], spectra: Mapping[str, Spectrum], budget: Budget, kl: bool
) -> Plan:
    """Complete an allocation's ranks: sites above break-even stay dense, the rest is counted.

    Args:
        ranks: what the allocation chose.
        spectra: of all sites.
        budget: what was asked.
        kl: whether the whitening's output metric is the KL curvature.
    """
    sites = {name: _site_plan(rank, spectra[name], budget, name) for name, rank in ranks.items()}
    kept = budget.cost(ranks)
    assert kept <= budget.limit, "an allocation exceeded its budget"
    return Plan(
        ratio_asked=budget.ratio,
        parameters_kept=kept,
        parameters_total=budget.total,
        predicted_kl=sum(site.dropped_energy for site in sites.values()) / 2 if kl else None,
        sites=sites,
    )


def _site_plan(rank: int, spectrum: Spectrum, budget: Budget, name: str) -> SitePlan:
    shape = budget.shapes[name]
    dense = rank > shape.break_even_rank
    kept = shape.full_rank if dense else rank
    change = spectrum.loss_change
    return SitePlan(
        out_features=shape.m,
        in_features=shape.n,
        rank=kept,
        dense=dense,
        dropped_energy=float((spectrum.sigma[kept:] ** 2).sum()),
        loss_change=None if change is None else float(change[kept:].sum()),
        damping_output=spectrum.damping_output,
        damping_input=spectrum.damping_input,
    )


def layer_and_role(site: str) -> tuple[int, str]:
    """Split a site's name at its first number: model.layers.3.mlp.up_proj is (3, mlp.up_proj)."""
    parts = site.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        return 0, site
    return int(parts[place]), ".".join(parts[place + 1 :])


def plan_frame(sites: Mapping[str, Mapping[str, Any]]) -> pandas.DataFrame:
    """Return one row per site of a plan: name, layer, role, rank, share of its parameters kept."""
    import pandas

    rows = []
    for name, site in sites.items():
        layer, role = layer_and_role(name)
        m, n, rank = site["out_features"], site["in_features"], site["rank"]
        kept = 1.0 if site["dense"] else rank * (m + n) / (m * n)
        rows.append({"site": name, "layer": layer, "role": role, "rank": rank, "kept": kept})
    return pandas.DataFrame(rows)
