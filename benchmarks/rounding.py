"""The evidence behind the defaults of int8: row scores, axes, rank budgets, and their predictions.

    python benchmarks/rounding.py model=local model.path=FOLDER dataset=local dataset.path=TEXTS

Ranks and whitening are those of io_svd_spectral, one set of statistics for all. Perplexity and KL
are measured on the evaluation text: KL(dense ‖ compressed), nats per token, which tells apart what
perplexity does not. The predictions for single rows are compared on calibration windows in float64,
because rounding one row moves the loss by less than float32 can tell. Prints the tables and writes
them to <results>/tables/rounding-<model>.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from iosvd.budget import Budget
from iosvd.cache.spectra import Factorized
from iosvd.data.windows import calibration_windows, evaluation_windows
from iosvd.errors import exit_in_one_line
from iosvd.layers.replacement import install_
from iosvd.layers.rows import restore, store_rows
from iosvd.method import Goal
from iosvd.models.loading import load_tokenizer
from iosvd.models.predictions import log_probabilities, summed_kl
from iosvd.pipeline import Compressed, compress_to, spectra_for
from iosvd.quantization import Axis, Half, LossAwareRemap, Quantization, RankBudget, Remap, Score
from iosvd.quantization.scores import row_scores
from iosvd.runs.config import compose_run
from iosvd.runs.run import Run
from iosvd.runs.steps import batch_size, calibration_of, loaded
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.system.progress import track
from iosvd.system.versions import commit
from iosvd.trials import TruncationTrials
from iosvd.truncation import TruncatedSites, with_gradient
from iosvd.types import Site
from iosvd.windows import Windows

METHOD = "io_svd_spectral"
RATIOS = (0.8, 0.6, 0.4)
COMPARED = (Score.absolute, Score.signed, Score.second_order)
SEEDS = range(5)  # Of the random control.
ROWS = 300  # Whose predictions are compared with measurements.
TRUNCATED = 0.6  # Ratio of that comparison.
WINDOWS = 8  # Calibration windows of that comparison.


@dataclass(frozen=True)
class Bench:
    """A model, its texts, and what all its compressions share."""

    run: Run
    tokens: Tensor
    text: Tensor
    factorized: Factorized
    log_probabilities: Tensor  # Of the dense model on `text`, (windows, length, vocabulary).

    @classmethod
    def of(cls, run: Run) -> Bench:
        """Load the model and collect its statistics once."""
        tokenizer, c = load_tokenizer(run.model), run.data.calibration
        tokens = calibration_windows(tokenizer, run.data.text, c.windows, c.seq_len, c.seed)
        text = evaluation_windows(tokenizer, run.data.text, run.eval.seq_len, run.eval.windows)
        model = loaded(run)
        # Remapping plans the highest ranks, so its spectra serve every scheme.
        remapped = replace(run.method, quantization=Remap())
        factorized = spectra_for(run.goal, remapped, calibration_of(run, model, tokens))
        return cls(run, tokens, text, factorized, predictions(model, text, run))

    def compressed(self, ratio: float, quantization: Quantization) -> Compressed:
        """Compress the model anew."""
        method = replace(self.run.method, quantization=quantization)
        calibration = calibration_of(self.run, loaded(self.run), self.tokens)
        return compress_to(Goal(ratio), method, calibration, self.factorized)

    def measure(self, model: PreTrainedModel) -> tuple[float, float]:
        """Return perplexity, and KL from the dense model, on the evaluation text."""
        found = predictions(model, self.text, self.run)
        dense = self.log_probabilities
        kl = summed_kl(dense, found) / self.text.numel()
        loss = cross_entropy(found[:, :-1].flatten(0, 1), self.text[:, 1:].flatten())
        return float(loss.double().exp()), float(kl)


@torch.no_grad()
def predictions(model: PreTrainedModel, text: Tensor, run: Run) -> Tensor:
    """Return the log-probabilities of all next tokens of a text, in main memory."""
    batches = text.split(batch_size(run, text))
    found = [log_probabilities(model, Windows(b), torch.float32).cpu() for b in batches]
    return torch.cat(found)


def schemes(ratio: float) -> Iterator[tuple[str, list[Quantization]]]:
    """Yield the name and the quantisations of each scheme that is compared at a ratio."""
    yield "remap", [Remap()]
    for axis in Axis:
        yield f"half, axis {axis.value}", [Half(axis)]
    most = min(1.0, 2 * ratio)
    budgets = {"min(1, 2 ratio)": LossAwareRemap()}
    for share in (0.25, 0.5, 0.75):  # From the ratio itself to almost all that fits.
        kept = round(ratio + share * (0.98 * most - ratio), 3)  # The scales take their part.
        budgets[f"{kept}"] = LossAwareRemap(rank_budget=RankBudget.fixed, rank_ratio=kept)
    for name, scheme in budgets.items():
        for score in COMPARED:
            yield f"rank budget {name}, {score.value}", [replace(scheme, score=score)]
        random = [replace(scheme, score=Score.random, seed=seed) for seed in SEEDS]
        yield f"rank budget {name}, random, {len(SEEDS)} seeds", list(random)
    searched = LossAwareRemap(Score.second_order, rank_budget=RankBudget.search)
    yield "rank budget searched", [searched]


def comparison(bench: Bench) -> pandas.DataFrame:
    """Measure every scheme at every ratio."""
    jobs = [(ratio, name, found) for ratio in RATIOS for name, found in schemes(ratio)]
    rows = []
    for ratio, name, quantizations in track(jobs, len(jobs), "schemes", "scheme"):
        results = [bench.compressed(ratio, quantization) for quantization in quantizations]
        measured = [bench.measure(result.model) for result in results]
        sites = results[0].plan.sites.values()
        rounded = sum(s.rounded_rows for s in sites) / sum(s.rows for s in sites)
        perplexities, kls = zip(*measured, strict=True)
        rows.append(
            {
                "ratio": f"{ratio:g}",
                "scheme": name,
                "achieved": f"{results[0].plan.ratio_achieved:.4f}",
                "int8 rows": f"{rounded:.0%}",
                "perplexity": _mean(perplexities, 5),
                "KL": _mean(kls, 6),
                "predicted KL": f"{results[0].plan.predicted_kl:.6f}",
            }
        )
    return pandas.DataFrame(rows)


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def truncated(bench: Bench, ratio: float) -> tuple[PreTrainedModel, Mapping[str, Site]]:
    """Return the truncated model in float64, and its sites with the gradient of its own loss."""
    run, model = bench.run, loaded(bench.run).double()
    calibration, spectra = calibration_of(run, model, bench.tokens), bench.factorized.spectra
    budget = Budget(calibration.shapes, ratio)
    objective = TruncationTrials(calibration, spectra, budget)
    ranks = run.method.allocation(spectra, budget, objective)
    sites = TruncatedSites(ranks, calibration.sites, spectra, budget)
    install_(model, sites)
    return model, with_gradient(sites, calibration, WINDOWS)


def single_rows(bench: Bench, ratio: float, axis: Axis) -> pandas.DataFrame:
    """Round rows one at a time; return the predicted and the measured changes."""
    model, sites = truncated(bench, ratio)
    text = bench.tokens[:WINDOWS]
    before = predictions(model, text, bench.run)
    candidates = [
        (site, key, row)
        for site in sites.values()
        for key, matrix in site.matrices().items()
        for row in range(matrix.values.shape[0 if axis.by_output(key, not site.factors) else 1])
    ]
    chosen = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))[:ROWS]
    found = []
    for index in track(chosen.tolist(), len(chosen), "rows", "row"):
        site, key, row = candidates[index]
        matrix, out = site.matrices()[key], axis.by_output(key, not site.factors)
        only = torch.zeros(matrix.values.shape[0 if out else 1], dtype=torch.bool)
        only[row] = True
        rows, layout = store_rows(matrix.values, only, torch.float64, out, site.name)
        error = restore(rows, layout, torch.float64) - matrix.values
        predicted = {
            kind.value: float(row_scores(matrix, error, out, kind).sum())
            for kind in (Score.signed, Score.second_order)
        }
        parameter = model.get_submodule(site.name).get_parameter(key)
        with torch.no_grad():
            original = parameter.clone()
            parameter.add_(error)
            after = predictions(model, text, bench.run)
            parameter.copy_(original)
        labels = text[:, 1:, None]
        change = (before - after)[:, :-1].gather(-1, labels).mean()
        kl = summed_kl(before, after) / text.numel()
        found.append({**predicted, "loss change": float(change), "KL": float(kl)})
    return pandas.DataFrame(found)


def agreement(found: pandas.DataFrame, ratio: float) -> str:
    """Describe how well single rows were predicted in a model truncated to a ratio."""
    ratios = (found["second_order"] / found["KL"]).median()
    pearson = found["signed"].corr(found["loss change"])
    ranks = found["second_order"].corr(found["KL"], method="spearman")
    rough = found["signed"].abs().corr(found["KL"], method="spearman")
    return (
        f"{len(found)} rows rounded one at a time in the model truncated to {ratio:g}, its own"
        f" {WINDOWS} calibration windows, float64: first-order against measured change of the"
        f" loss, Pearson {pearson:.3f}; second-order against measured KL, Spearman {ranks:.3f},"
        f" median predicted / measured {ratios:.2f}; |first order| against measured KL, Spearman"
        f" {rough:.3f}."
    )


def report(bench: Bench) -> str:
    """Measure and return the page."""
    table = comparison(bench).to_markdown(index=False, disable_numparse=True)
    run, shape = bench.run, bench.text.shape
    dense, _ = bench.measure(loaded(run))
    return (
        f"# int8 rows, {run.model.name}\n\n{table}\n\n"
        f"Dense: perplexity {dense:.5f}. KL(dense ‖ compressed), nats per token, on"
        f" {shape[0]} × {shape[1]} tokens of evaluation text; random: mean and standard deviation."
        f" Ranks of {METHOD}, calibration {bench.tokens.shape[0]} × {bench.tokens.shape[1]} tokens"
        f" of {run.data.dataset.name}. Commit {commit()}, {time.strftime('%Y-%m-%d')}.\n\n"
        f"{agreement(single_rows(bench, TRUNCATED, Axis.component), TRUNCATED)}\n"
    )


if __name__ == "__main__":
    with exit_in_one_line():
        asked = compose_run([*arguments(__doc__), f"method={METHOD}"])
        page = report(Bench.of(asked))
        target = Path(asked.runtime.output.results) / "tables" / f"rounding-{asked.model.name}.md"
        made(target.parent)
        write_text(target, page)
        print(page)
