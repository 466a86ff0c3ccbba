"""Predict KL divergence and perplexity against the ratio, from one pass of statistics: make predict

    python experiments/predict.py model=local model.path=FOLDER dataset=local dataset.path=TEXTS
    python experiments/predict.py measure=0.9,0.6 …

½ Σ σ² of dropped components under the whole vocabulary's KL metric is the prediction (METHODS 1,
identity 5); perplexity is the dense model's times its exponential, exact where the text follows the
model's own distribution. `measure` names ratios at which the model is compressed and measured too:
six for the embedded model, none for others. Writes <results>/tables/predict-<model>.md and .csv and
<results>/figures/predict-<model>.png.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path

import pandas
from torch import Tensor

from iosvd import figures
from iosvd.budget import check_ratio
from iosvd.cache.calibration import Calibration
from iosvd.cache.spectra import Factorized
from iosvd.data.windows import calibration_windows, evaluation_windows
from iosvd.errors import BudgetError, ConfigError, exit_in_one_line
from iosvd.evaluation.divergence import divergence
from iosvd.evaluation.perplexity import perplexity
from iosvd.factorization import dropped_energy
from iosvd.method import Goal
from iosvd.models.loading import load_tokenizer
from iosvd.models.sites import find_sites
from iosvd.pipeline import compress_to, spectra_for
from iosvd.runs.config import compose_run, own_option
from iosvd.runs.run import Run
from iosvd.runs.steps import batch_size, calibration_of, loaded
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text, written_whole
from iosvd.system.progress import track
from iosvd.system.versions import commit
from iosvd.target import check_target
from iosvd.trials import TruncationTrials
from iosvd.types import Spectrum

METHOD = ("method=io_svd_spectral", "whitening.top_k=0")
RATIOS = [percent / 100 for percent in range(20, 100, 2)]
MEASURED = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # Of the embedded model.
GOOD = 1.5  # A prediction within this factor of the measured divergence is called good.


def predict(overrides: list[str]) -> str:
    """Predict, measure at the given ratios, write and return the page."""
    asked, rest = own_option(overrides, "measure")
    run = compose_run([*METHOD, *rest])
    # A method that can have a target can be predicted.
    check_target(GOOD, run.method.whitening, run.method.quantization)
    default = MEASURED if run.model.embedded else ()
    measured = list(default) if asked is None else _ratios(asked)
    tokenizer, c = load_tokenizer(run.model), run.data.calibration
    tokens = calibration_windows(tokenizer, run.data.text, c.windows, c.seq_len, c.seed)
    text = next(iter(run.eval.texts.values()))
    windows = evaluation_windows(tokenizer, text, run.eval.seq_len, run.eval.windows)
    model = loaded(run)
    calibration = calibration_of(run, model, tokens)
    factorized = spectra_for(run.goal, run.method, calibration)
    dense = perplexity(model, windows, batch_size(run, windows))
    ratios = sorted({*RATIOS, *measured})
    predicted = [predicted_kl(run, ratio, calibration, factorized.spectra) for ratio in ratios]
    feasible = [point for point in predicted if point is not None]
    curve = pandas.DataFrame(feasible, columns=["ratio", "predicted_kl"])
    curve["predicted_perplexity"] = dense * curve["predicted_kl"].clip(upper=50).map(math.exp)
    points = [
        measure(run, ratio, calibration, factorized, windows)
        for ratio in track(measured, len(measured), "measurement", "ratio")
    ]
    found = pandas.DataFrame(points, columns=["ratio", "kl", "perplexity"])
    return _write(run, rest, curve.merge(found, on="ratio", how="left"), dense, text.name)


def predicted_kl(
    run: Run, ratio: float, calibration: Calibration, spectra: Mapping[str, Spectrum]
) -> tuple[float, float] | None:
    """Return a ratio and its predicted KL, None if the sites do not allow it."""
    try:
        budget = _goal(run, ratio).budget(calibration, run.method)
    except BudgetError:
        return None
    objective = TruncationTrials(calibration, spectra, budget)
    ranks = run.method.allocation(spectra, budget, objective)
    return ratio, dropped_energy(ranks, spectra, budget) / 2


def measure(
    run: Run, ratio: float, calibration: Calibration, factorized: Factorized, windows: Tensor
) -> tuple[float, float, float]:
    """Compress to a ratio and return it, the exact KL on held-out text, and the perplexity."""
    model, size = loaded(run), batch_size(run, windows)
    found = find_sites(model, run.model.sites)
    sites = {name: found[name] for name in calibration.sites}
    again = dataclasses.replace(calibration, model=model, sites=sites)
    compress_to(_goal(run, ratio), run.method, again, factorized)
    kl = divergence(calibration.model, model, windows, size).kl
    return ratio, kl, perplexity(model, windows, size)


def _goal(run: Run, ratio: float) -> Goal:
    return dataclasses.replace(run.goal, ratio=ratio)


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",") if part]
    except ValueError:
        raise ConfigError(
            f"measure={text} is no list of ratios; for instance measure=0.8,0.6"
        ) from None
    for ratio in ratios:
        check_ratio(ratio)
    return ratios


def _limit(frame: pandas.DataFrame) -> str:
    """Describe down to which ratio the prediction agrees with the measured points."""
    points = frame.dropna(subset=["predicted_kl", "kl"]).sort_values("ratio", ascending=False)
    if points.empty:
        return "Nothing was measured here; measure=0.8,0.6 checks the prediction."
    off = points[(points["kl"] / points["predicted_kl"]).map(lambda r: not 1 / GOOD <= r <= GOOD)]
    if off.empty:
        return f"Within a factor of {GOOD} at every measured ratio."
    first = off.iloc[0]
    return (
        f"Outside a factor of {GOOD} first at ratio {first['ratio']:g}: measured"
        f" {first['kl']:.4f} nats, predicted {first['predicted_kl']:.4f}."
    )


def _write(run: Run, overrides: list[str], frame: pandas.DataFrame, dense: float, text: str) -> str:
    results, name = Path(run.runtime.output.results), f"predict-{run.model.name}"
    c = run.data.calibration
    tables, drawings = made(results / "tables"), made(results / "figures")
    write_text(tables / f"{name}.csv", frame.to_csv(index=False))
    drawn = figures.predicted_curve(frame, dense, text)
    with written_whole(drawings / f"{name}.png") as partial:
        drawn.savefig(partial, dpi=120, format="png", metadata={"Software": None})
    tenths = frame["ratio"].map(lambda ratio: round(100 * ratio) % 10 == 0)
    shown = frame[tenths | frame["kl"].notna()]
    table = shown.sort_values("ratio", ascending=False).to_markdown(index=False, floatfmt=".4f")
    page = (
        f"# Predicted divergence, {run.model.name}\n\n{table}\n\n{_limit(frame)}\n\n"
        f"KL(dense ‖ compressed) in nats per token; perplexity on {text}, dense {dense:.3f}. Method"
        f" {' '.join([*METHOD, *overrides])}, calibration {c.windows} × {c.seq_len}"
        f" tokens of {run.data.dataset.name}; every second percent is in the csv."
        f" Commit {commit()}, {time.strftime('%Y-%m-%d')}.\n"
    )
    write_text(tables / f"{name}.md", page)
    return page


if __name__ == "__main__":
    with exit_in_one_line():
        print(predict(arguments(__doc__)))
