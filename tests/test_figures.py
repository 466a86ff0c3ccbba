"""Figures show the values they are given, and leave out what is missing."""

from __future__ import annotations

from typing import Any

import pandas
import pytest
import torch

from iosvd import figures
from iosvd.metric import accuracy_on, perplexity_on

SITES: dict[str, Any] = {
    name: {
        **dict(zip(("out_features", "in_features", "rank", "bits"), numbers, strict=True)),
        **{"rounded_rows": 0, "rows": 0},
    }
    for name, numbers in {
        "model.layers.0.attn.q": (8, 8, 2, 16 * 32),
        "model.layers.1.attn.q": (8, 8, 8, 16 * 64),
        "model.layers.0.up": (24, 8, 3, 16 * 96),
    }.items()
}
PPL, TASK = perplexity_on("x"), accuracy_on("task")
FRAME = pandas.DataFrame(
    [
        {"label": "dense", "method": "Dense", "ratio": 1.0, "x_ppl": 10.0, "task": 0.5, "k": None},
        {"label": "a", "method": "A", "ratio": 0.4, "x_ppl": 40.0, "task": 0.3, "k": 1},
        {"label": "a", "method": "A", "ratio": 0.8, "x_ppl": 20.0, "task": None, "k": 5},
        {"label": "b", "method": "B", "ratio": 0.4, "x_ppl": None, "task": 0.2, "k": 0},
    ]
)


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("gpt_neox.layers.11.mlp.dense_h_to_4h", (11, "mlp.dense_h_to_4h")),
        ("head", (0, "head")),
    ],
)
def test_a_site_is_a_layer_and_a_role(site: str, expected: tuple[int, str]) -> None:
    assert figures.layer_and_role(site) == expected


def test_the_map_shows_the_share_kept_and_writes_the_rank() -> None:
    axes = figures.rank_map(SITES).axes[0]
    shown = axes.images[0].get_array()
    assert shown is not None
    assert shown[0, 0] == 2 * 16 / 64 and shown[0, 1] == 1.0
    assert shown[1, 0] == 3 * 32 / 192 and shown.mask[1, 1]  # No such site: no colour.
    assert sorted(text.get_text() for text in axes.texts) == ["2", "3", "8"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attn.q", "up"]


def test_spectra_have_one_line_per_layer_and_no_zero_on_a_logarithmic_axis() -> None:
    sigma = {"l.0.a": torch.tensor([2.0, 1.0, 0.0]), "l.1.a": torch.tensor([3.0, 2.0, 1.0])}
    (axes,) = figures.spectra(sigma).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[2, 1], [3, 2, 1]]


def test_curves_are_sorted_and_gaps_are_left_out() -> None:
    titles = {"x_ppl": "perplexity"}
    drawn = figures.quality_against(FRAME, "ratio", [PPL, TASK], titles)
    left, right = drawn.axes
    assert left.get_title() == "perplexity" and left.get_yscale() == "log"
    dense, line = left.lines  # B has no perplexity.
    assert list(dense.get_ydata()) == [10, 10]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.4, 0.8], [40, 20])
    assert [line.get_label() for line in right.lines] == ["dense", "A", "B"]
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "A", "B"]


def test_an_ablation_divides_perplexity_by_the_dense_model_and_names_zero_all() -> None:
    frame = FRAME.assign(line=[f"ratio {ratio:g}" for ratio in FRAME["ratio"]])
    left, right = figures.quality_against_option(frame, "k", [PPL, TASK], {}).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[4.0], [2.0]]  # Two ratios.
    assert [bars.get_label() for bars in left.containers] == ["ratio 0.4", "ratio 0.8"]
    assert list(right.lines[0].get_xdata()) == ["1", "all"]
    assert list(right.lines[0].get_ydata()) == [0.3, 0.2]


def test_an_ablation_draws_means_with_their_spread_a_line_for_each_kind() -> None:
    frame = FRAME.assign(line=["dense", "first", "first", "second"], x_ppl_spread=[0, 2.0, 1.0, 0])
    (axes,) = figures.quality_against_option(frame, "k", [PPL], {}).axes
    (bars,) = axes.containers  # B has no value; of A both.
    assert bars.get_label() == "first"
    assert list(bars.lines[0].get_ydata()) == [4.0, 2.0]  # Relative to dense.
    lengths = [abs(top - bottom) / 2 for (_, bottom), (_, top) in bars.lines[2][0].get_segments()]
    assert lengths == pytest.approx([0.2, 0.1])


def test_predictions_stand_over_what_was_measured() -> None:
    numbers = {"predicted_kl": [0.01, 0.2], "kl": [0.02, 0.3]}
    whole = pandas.DataFrame(
        {"method": "io", "ratio": [0.8, 0.4], **numbers}
        | {"predicted_loss_change": [0.0, 0.1], "loss_change": [0.01, 0.4]}
    )
    sites = pandas.DataFrame(
        {"ratio": [0.8, 0.8, 0.4], "predicted_kl": [1e-4, 2e-4, 3e-3], "kl": 1e-3}
    )
    left, middle, right = figures.predictions(whole, sites).axes
    assert list(left.lines[0].get_xdata()) == [0.02, 0.3]
    assert list(left.lines[0].get_ydata()) == [0.01, 0.2]
    assert [line.get_label() for line in middle.lines[:2]] == ["ratio 0.8", "ratio 0.4"]
    assert list(middle.lines[0].get_ydata()) == [1e-4, 2e-4]
    assert list(right.lines[0].get_ydata()) == [0.0, 0.1]
    for axes in (left, middle, right):  # The diagonal.
        assert list(axes.lines[-1].get_xdata()) == list(axes.lines[-1].get_ydata())


def test_the_predicted_curve_shows_the_points_that_were_measured() -> None:
    frame = pandas.DataFrame(
        {
            "ratio": [0.8, 0.4],
            **{"predicted_kl": [0.01, 0.2], "kl": [None, 0.3]},
            **{"predicted_perplexity": [20.2, 24.0], "perplexity": [None, 27.0]},
        }
    )
    left, right = figures.predicted_curve(frame, 20.0, "text").axes
    assert list(left.lines[0].get_xdata()) == [0.4, 0.8]
    assert float(left.lines[1].get_ydata()[0]) == 0.3
    assert [line.get_label() for line in right.lines] == ["predicted", "measured", "dense"]
