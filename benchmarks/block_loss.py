"""The KL that a block's error is predicted to cause against the KL it causes: make block-loss

    python benchmarks/block_loss.py model=local model.path=FOLDER dataset=… eval=…

One block at a time is truncated to the ranks that the method gives it, and all else stays dense.
With e the error of the block's output and C_b the KL curvature behind it, ½ E[eᵀ C_b e] is the loss
that block refinement trains on (METHODS 11.5); E[e²] is AA-SVD's. Both are measured on the run's
first text, which C_b has not seen, beside the exact KL there. Writes
<results>/tables/block_loss-<model>.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iosvd.cache.calibration import Calibration
from iosvd.data.windows import calibration_windows, evaluation_windows
from iosvd.errors import exit_in_one_line
from iosvd.evaluation.divergence import divergences
from iosvd.layers.replacement import truncated_weights
from iosvd.models.forward import output_of
from iosvd.models.loading import load_tokenizer
from iosvd.models.sites import decoder_blocks, named_blocks, names_within
from iosvd.pipeline import spectra_for
from iosvd.runs.config import compose_run
from iosvd.runs.run import Run
from iosvd.runs.steps import batch_size, calibration_of, loaded
from iosvd.statistics.block_curvature import block_curvatures
from iosvd.statistics.kl_metric import KLMetric
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.system.versions import commit
from iosvd.trials import TruncationTrials
from iosvd.types import Spectrum

METHOD = "method=io_svd_spectral"
RATIOS = (0.8, 0.6, 0.4)
WINDOWS = 32  # Of the text.


def benchmark(overrides: list[str]) -> str:
    """Predict, measure, write and return the page."""
    run = compose_run([METHOD, *overrides])
    tokenizer, c = load_tokenizer(run.model), run.data.calibration
    tokens = calibration_windows(tokenizer, run.data.text, c.windows, c.seq_len, c.seed)
    text = next(iter(run.eval.texts.values()))
    windows = evaluation_windows(tokenizer, text, run.eval.seq_len, WINDOWS)
    model = loaded(run)
    calibration = calibration_of(run, model, tokens)
    size = batch_size(run, windows)
    curvatures = block_curvatures(model, tokens, KLMetric(0), size)
    spectra = spectra_for(run.goal, run.method, calibration).spectra
    rows = [
        row
        for ratio in RATIOS
        for row in measured_blocks(run, ratio, calibration, spectra, curvatures, windows)
    ]
    return _write(run, pandas.DataFrame(rows), text.name, overrides)


def measured_blocks(
    run: Run,
    ratio: float,
    calibration: Calibration,
    spectra: Mapping[str, Spectrum],
    curvatures: list[Tensor],
    windows: Tensor,
) -> Iterator[dict[str, float]]:
    """Yield a row for every block that the ratio truncates."""
    budget = replace(run.goal, ratio=ratio).budget(calibration, run.method)
    objective = TruncationTrials(calibration, spectra, budget)
    chosen = run.method.allocation(spectra, budget, objective)
    ranks, model, size = budget.factorised(chosen), calibration.model, batch_size(run, windows)
    for number, start in enumerate(named_blocks(model)):
        mine = {name: ranks[name] for name in names_within(start, ranks).values()}
        if not mine:
            continue

        truncated = partial(truncated_weights, calibration.sites, spectra, mine)
        error = block_outputs(model, number, windows, size)
        with truncated():
            error = block_outputs(model, number, windows, size) - error
        metric = curvatures[number].to(error)
        weighted = float(((error @ metric) * error).sum(-1).mean() / 2)
        exact = divergences(model, {"block": (model, truncated)}, windows, size)["block"].kl
        yield {
            "ratio": ratio,
            "block": number,
            "½ E[eᵀ C e]": weighted,
            "E[e²]": float(error.square().mean()),
            "KL": exact,
            "predicted / KL": weighted / exact,
        }


@torch.no_grad()
def block_outputs(model: PreTrainedModel, number: int, windows: Tensor, size: int) -> Tensor:
    """Return the outputs (tokens, d) of a block, in float64."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        kept.append(output_of(output).double().flatten(0, 1).cpu())

    hook = decoder_blocks(model)[number].register_forward_hook(keep)
    try:
        for batch in windows.split(size):
            model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        hook.remove()
    return torch.cat(kept)


def _write(run: Run, frame: pandas.DataFrame, text: str, overrides: list[str]) -> str:
    lines = []
    for ratio, rows in frame.groupby("ratio", sort=False):
        ranks = rows[["½ E[eᵀ C e]", "E[e²]", "KL"]].rank()
        weighted, plain = (ranks[name].corr(ranks["KL"]) for name in ("½ E[eᵀ C e]", "E[e²]"))
        worst = rows["predicted / KL"].agg(["min", "max"]).tolist()
        lines.append(
            f"Ratio {ratio:g}: predicted / measured from {worst[0]:.2f} to {worst[1]:.2f}; rank"
            f" correlation with the KL over blocks {weighted:.2f}, of E[e²] {plain:.2f}."
        )
    table = frame.to_markdown(index=False, floatfmt=".4g")
    page = (
        f"# The loss of a block, {run.model.name}\n\n{table}\n\n" + "\n".join(lines) + "\n\n"
        f"Nats per token on {WINDOWS} windows of {text}; C from {run.data.calibration.windows}"
        f" windows of {run.data.dataset.name}; {METHOD} {' '.join(overrides)}; commit {commit()},"
        f" {time.strftime('%Y-%m-%d')}.\n"
    )
    folder = made(Path(run.runtime.output.results) / "tables")
    write_text(folder / f"block_loss-{run.model.name}.md", page)
    return page


if __name__ == "__main__":
    with exit_in_one_line():
        print(benchmark(arguments(__doc__)))
