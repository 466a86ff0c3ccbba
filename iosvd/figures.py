"""Draw figures: pure functions from values to matplotlib figures, which the caller saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from torch import Tensor

from iosvd.metric import Metric
from iosvd.models.sites import layer_and_role
from iosvd.plan import plan_frame

DENSE = "dense"  # The preset that changes nothing.
_WIDTH = 7.0  # Inches.
_MARKERS = "os^Dv<>PX*"


def rank_map(sites: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the share of parameters that every site keeps: roles by layers, ranks written in."""
    frame = plan_frame(sites)
    roles = list(dict.fromkeys(frame["role"]))
    layers = sorted(set(frame["layer"]))
    kept = frame.pivot_table(index="role", columns="layer", values="kept").loc[roles]
    ranks = frame.pivot_table(index="role", columns="layer", values="rank").loc[roles]
    figure = _figure(max(_WIDTH, 0.5 * len(layers) + 2.5), 0.42 * len(roles) + 1.4)
    axes = figure.subplots()
    image = axes.imshow(kept, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    for row, column in numpy.argwhere(kept.notna().to_numpy()):
        shade = "white" if kept.iat[row, column] < 0.6 else "black"
        text = f"{ranks.iat[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(roles)), roles)
    axes.set_xlabel("layer")
    axes.set_title("ranks; colour: share of the site's parameters kept")
    figure.colorbar(image, ax=axes)
    return figure


def spectra(sigma: Mapping[str, Tensor]) -> Figure:
    """Draw the singular values of the whitened weights, one panel per role, one line per layer."""
    roles = list(dict.fromkeys(layer_and_role(site)[1] for site in sigma))
    layers = [layer_and_role(site)[0] for site in sigma]
    columns = min(4, len(roles))
    rows = -(-len(roles) // columns)
    figure = _figure(2.4 * columns + 0.6, 2.0 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, role in zip(grid, roles, strict=False):
        axes.set_title(role, fontsize=8)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    for site, values in sigma.items():
        layer, role = layer_and_role(site)
        shade = _shade(layer, max(layers))
        positive = values[values > 0]  # A logarithmic axis has no zero.
        grid[roles.index(role)].plot(positive.numpy(), color=shade, linewidth=1)
    for axes in grid[len(roles) :]:
        axes.set_visible(False)
    figure.supxlabel("component", fontsize=9)
    figure.supylabel("whitened σ; darker: earlier layer", fontsize=9)
    return figure


def quality_against(
    frame: pandas.DataFrame, x: str, metrics: Sequence[Metric], titles: Mapping[str, str]
) -> Figure:
    """Draw one panel per metric, one line per method over `x`, the dense model as a grey line.

    Args:
        frame: of a table (`to_frame`), with a column `x`; gaps are left out.
        x: the column of the horizontal axis, for instance ratio or target_bytes.
        metrics: one panel each; perplexities get a logarithmic axis.
        titles: what to write for a column.
    """
    figure, panels = _panels(metrics, titles)
    for axes, metric in zip(panels, metrics, strict=True):
        rows = frame.dropna(subset=[x, metric.name])
        _dense_line(axes, rows, metric)
        for number, method in enumerate(_methods(rows)):
            mine = rows[rows["method"] == method].sort_values(x)
            # Colours and marks repeat after ten.
            style = "-" if number < 10 else "--"
            mark = _MARKERS[number % 10]
            axes.plot(mine[x], mine[metric.name], marker=mark, linestyle=style, label=method)
        axes.set_xlabel(titles.get(x, x))
    _share_legend(figure, panels)
    return figure


def quality_against_option(
    frame: pandas.DataFrame, option: str, metrics: Sequence[Metric], titles: Mapping[str, str]
) -> Figure:
    """Draw an ablation: a panel per metric, a line per `line`, an option's values equally spaced.

    Perplexities are divided by the dense model's, so that texts can be compared (IO-SVD, Figure 3).
    Where rows are means over runs, bars are the standard deviation.

    Args:
        frame: of a table, with a column `option` in the order to be drawn, and a column `line`.
        option: the name of that column; its 0 is shown as "all".
        metrics: one panel each.
        titles: what to write for a column.
    """
    figure, panels = _panels(metrics, titles)
    for axes, metric in zip(panels, metrics, strict=True):
        rows = frame.dropna(subset=[metric.name])
        dense = rows[rows["label"] == DENSE]
        relative = metric.is_perplexity and len(dense) > 0
        unit = dense[metric.name].iloc[0] if relative else 1.0
        for name, mine in rows[rows["label"] != DENSE].groupby("line", sort=False):
            names = ["all" if value == 0 else f"{value:g}" for value in mine[option]]
            spread = mine[f"{metric}_spread"] / unit if f"{metric}_spread" in mine else None
            mean = mine[metric.name] / unit
            axes.errorbar(names, mean, spread, marker="o", label=name, capsize=2)
        axes.set_xlabel(option)
        axes.set_yscale("linear")
        if relative:
            axes.set_title(f"{titles.get(metric.name, metric.name)} / dense", fontsize=10)
        else:
            _dense_line(axes, rows, metric)
    _share_legend(figure, panels)
    return figure


def predictions(whole: pandas.DataFrame, sites: pandas.DataFrame) -> Figure:
    """Draw predicted against measured: divergence and loss of the model, divergence of each site.

    Args:
        whole: a row per run: method, ratio, predicted_kl, kl, predicted_loss_change, loss_change.
        sites: a row per site and run: ratio, predicted_kl, kl; of one site truncated at a time.
    """
    figure = _figure(12.0, 4.0)
    left, middle, right = figure.subplots(1, 3)
    for number, (method, mine) in enumerate(whole.groupby("method", sort=False)):
        mark = _MARKERS[number % 10]
        left.plot(mine["kl"], mine["predicted_kl"], marker=mark, label=method)
        for _, row in mine.iterrows():
            left.annotate(f"{row['ratio']:g}", (row["kl"], row["predicted_kl"]), fontsize=6)
        scored = mine.dropna(subset=["predicted_loss_change"])
        if len(scored):
            right.plot(
                scored["loss_change"], scored["predicted_loss_change"], marker=mark, label=method
            )
    for ratio, mine in sites.groupby("ratio", sort=False):
        middle.plot(mine["kl"], mine["predicted_kl"], ".", label=f"ratio {ratio:g}", markersize=4)
    left.set_title("KL of the model, nats per token", fontsize=10)
    middle.set_title("KL of one site truncated alone", fontsize=10)
    right.set_title("change of the loss, first order", fontsize=10)
    for axes in (left, middle):
        axes.set_xscale("log")
        axes.set_yscale("log")
    for axes in (left, middle, right):
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="grey", linestyle="--", linewidth=1)
        axes.grid(alpha=0.3)
        axes.set_xlabel("measured on held-out text")
        axes.set_ylabel("predicted")
        axes.legend(fontsize=6)
    return figure


def predicted_curve(frame: pandas.DataFrame, dense: float, text: str) -> Figure:
    """Draw predicted KL and perplexity against the ratio, with the points that were measured.

    Args:
        frame: columns ratio, predicted_kl, predicted_perplexity, and kl and perplexity where
            measured.
        dense: perplexity of the dense model.
        text: on which it was measured.
    """
    figure = _figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    frame = frame.sort_values("ratio")
    for axes, predicted, measured in (
        (left, "predicted_kl", "kl"),
        (right, "predicted_perplexity", "perplexity"),
    ):
        axes.plot(frame["ratio"], frame[predicted], label="predicted")
        axes.plot(frame["ratio"], frame[measured], "o", label="measured")
        axes.set_yscale("log")
        axes.set_xlabel("maintenance ratio")
        axes.grid(alpha=0.3)
    left.set_title("KL(dense ‖ compressed), nats per token", fontsize=10)
    right.set_title(f"{text} perplexity", fontsize=10)
    right.axhline(dense, color="grey", linestyle="--", label="dense")
    right.legend(fontsize=8)
    return figure


def throughput(measured: pandas.DataFrame, published: pandas.DataFrame) -> Figure:
    """Draw decoding speed against peak memory, both relative to the dense model's.

    Args:
        measured: columns model, batch, prompt, new, "decode / dense" and "peak / dense".
        published: columns variant, peak_gib and decode_ratio; the dense model's row is the first.
    """
    loads = list(measured.groupby(["batch", "prompt", "new"], sort=False))
    figure = _figure(3.4 * min(3, len(loads)) + 0.6, 3.0 * -(-len(loads) // 3) + 0.9)
    grid = figure.subplots(-(-len(loads) // 3), min(3, len(loads)), squeeze=False).ravel()
    models = list(dict.fromkeys(measured["model"]))
    paper = published.dropna(subset=["decode_ratio"])
    for axes, ((batch, prompt, new), rows) in zip(grid, loads, strict=False):
        for model, marker in zip(models, _MARKERS, strict=False):
            mine = rows[rows["model"] == model]
            axes.plot(mine["peak / dense"], mine["decode / dense"], marker, label=model)
        peaks = paper["peak_gib"] / published["peak_gib"].iat[0]
        axes.plot(peaks, paper["decode_ratio"], "k+", label="paper, 64 × (1024 + 1024), 7B")
        axes.axhline(1, color="grey", lw=0.5)
        axes.axvline(1, color="grey", lw=0.5)
        axes.set_title(f"batch {batch}, {prompt} + {new} tokens", fontsize=9)
        axes.set_xlabel("peak memory / dense")
        axes.set_ylabel("decode tokens per second / dense")
    for axes in grid[len(loads) :]:
        axes.set_axis_off()
    _share_legend(figure, list(grid[: len(loads)]))
    return figure


def _panels(metrics: Sequence[Metric], titles: Mapping[str, str]) -> tuple[Figure, list[Axes]]:
    figure = _figure(3.5 * len(metrics) + 1.6, 3.4)
    panels = list(figure.subplots(1, len(metrics), squeeze=False)[0])
    for axes, metric in zip(panels, metrics, strict=True):
        axes.grid(alpha=0.3)
        axes.set_title(titles.get(metric.name, metric.name), fontsize=10)
        if metric.is_perplexity:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
            axes.tick_params(axis="y", which="both", labelsize=7)
    return figure, panels


def _methods(frame: pandas.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame["method"][frame["label"] != DENSE]))


def _dense_line(axes: Axes, frame: pandas.DataFrame, metric: Metric) -> None:
    dense = frame[metric.name][frame["label"] == DENSE]
    if len(dense):
        axes.axhline(dense.iloc[0], color="grey", linestyle="--", label="dense")


def _share_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {t: line for line, t in zip(*axes.get_legend_handles_labels(), strict=True)}
    place: Any = {"loc": "outside right center", "fontsize": 8}
    figure.legend(list(handles.values()), list(handles), **place)


def _shade(layer: int, last: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](layer / max(1, last) * 0.9)


def _figure(width: float, height: float) -> Figure:
    # Not pyplot, which keeps every figure in a global list and may open a window.
    return Figure(figsize=(width, height), layout="constrained")
