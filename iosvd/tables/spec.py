"""The specification of a table, from conf/table/<name>.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import OmegaConf

from iosvd.errors import ConfigError, check_name
from iosvd.options import typed_group
from iosvd.presets import conf_folder

# Columns besides the metrics; those of BY_TEXT have one for each text.
BY_TEXT = ("kl", "loss_change", "site_median", "sites_within_two")
EXTRA = (
    *("ratio_achieved", "cache_ratio", "whole_ratio", "seconds", "target_bytes"),
    *("predicted_kl", "predicted_loss_change", "rank_agreement"),
    *BY_TEXT,
)


@dataclass(frozen=True)
class RowSpec:
    """One method's row, in every group of rows (model and ratio)."""

    name: str  # Shown in the table.
    label: str | None = None  # Label of the runs; None: not implemented yet.
    published: list[str] = field(default_factory=list)  # The papers' names for it, by precedence.
    note: str | None = None  # How our row differs from the published one.


@dataclass(frozen=True)
class PublishedTable:
    """A published table whose numbers stand beside ours."""

    source: str
    table: str


@dataclass(frozen=True)
class Tolerance:
    """The largest difference between measured and published values in `make compare`."""

    perplexity: float = 0.05  # Relative.
    accuracy: float = 0.02  # Absolute: 2 points, about one standard error of the smallest task.


@dataclass(frozen=True)
class TableSpec:
    """A table's title, rows, and published counterparts."""

    title: str
    model: str | None = None  # Preset of the published model, shown beside other models.
    rows: list[RowSpec] = field(default_factory=list)
    published: list[PublishedTable] = field(default_factory=list)  # By precedence.
    tolerance: Tolerance = field(default_factory=Tolerance)
    extra: list[str] = field(default_factory=list)  # Columns after the metrics, of EXTRA.
    notes: list[str] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)  # Horizontal axes of the figures.
    spread: str | None = None  # An option over whose values rows show mean and spread.
    predictions: bool = False  # Draw predicted against measured divergence.
    shown_run: dict[str, float] = field(default_factory=dict)  # Label → ratio: ranks and spectra.


def table_spec(name: str) -> TableSpec:
    """Read conf/table/<name>.yaml.

    Raises:
        ConfigError: there is no such table, or it has an unknown option.
    """
    check_name("table", name)
    path = conf_folder() / "table" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"there is no table {name}; tables: {known}")
    written = OmegaConf.create({name: OmegaConf.load(path)})
    spec = typed_group(TableSpec, written, name, f"table {name}")
    if unknown := sorted(set(spec.extra) - set(EXTRA)):
        raise ConfigError(
            f"table {name}: no extra column {unknown[0]}; there are {', '.join(EXTRA)}"
        )
    return spec
