"""Statistics, spectra and ranks of a small trained model on the device, against the CPU in fp64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.setting import Setting, Table
from iosvd.allocation import Spectral
from iosvd.budget import Budget, Shape
from iosvd.data.texts import Dataset
from iosvd.data.windows import calibration_windows
from iosvd.factorization import Factorization
from iosvd.models.loading import Dtype, Model, load_model, load_tokenizer
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.statistics.collect import collect
from iosvd.statistics.needs import SiteStatistics
from iosvd.types import Spectrum
from iosvd.whitening import InputOutput

WINDOWS, LENGTH, RATIO = 8, 128, 0.6
TINY = Model("tiny", embedded=True, dtype=Dtype.float32)


def numbers(setting: Setting) -> list[Table]:
    """Compare every precision of the device with float64 on the CPU."""
    dataset = Dataset("pydoc", builtin=True)
    tokens = calibration_windows(load_tokenizer(TINY), dataset, WINDOWS, LENGTH, 0)
    exact = _found(load_model(TINY).double(), tokens)
    kinds = [(dtype, 0) for dtype in (Dtype.bfloat16, Dtype.float16, Dtype.float32)]
    rows = []
    for dtype, seed in [*kinds, (Dtype.float32, 1)]:
        name = dtype.value if seed == 0 else f"{dtype.value}, other random signs"

        def compared(dtype: Dtype = dtype, seed: int = seed) -> dict[str, str]:
            model = load_model(replace(TINY, dtype=dtype), str(setting.device))
            return _row(exact, _found(model, tokens, seed))

        rows.append(setting.row({"dtype": name}, 5.0, compared))
    notes = (
        f"The embedded model, {WINDOWS} × {LENGTH} tokens, against float64 on the CPU (norms and"
        " rotary embeddings in float32); the largest relative error of any site, in the Frobenius"
        f" norm; ranks of the second-order allocation at {RATIO:g}. C is estimated with random"
        " signs: a rounding that swaps two of the top tokens changes the estimate by as much as"
        " other signs do."
    )
    return [Table("Numbers", rows, notes)]


def _found(
    model: PreTrainedModel, tokens: Tensor, seed: int = 0
) -> tuple[dict[str, SiteStatistics], dict[str, Spectrum], dict[str, int]]:
    """Return statistics, spectra and ranks of a model, in its dtype and on its device."""
    sites, whitening = find_sites(model, SiteSelection()), InputOutput(seed=seed)
    statistics = collect(model, tokens, sites, whitening.needs, batch_size=4)
    spectra = {}
    for name, site in sites.items():
        precise = statistics[name].to(site.weight.device, torch.float64)
        spectra[name] = Factorization()(site.weight, whitening(precise), name)
    budget = Budget({name: Shape(*site.weight.shape) for name, site in sites.items()}, RATIO)
    ranks = Spectral()(spectra, budget, None)  # type: ignore[arg-type]
    return statistics, spectra, ranks


def _row(exact: tuple, found: tuple) -> dict[str, str]:
    (statistics, spectra, ranks), (mine, my_spectra, my_ranks) = exact, found

    def worst(field: str) -> str:
        pairs = ((getattr(mine[s], field), getattr(statistics[s], field)) for s in mine)
        return f"{max(_error(*pair) for pair in pairs):.1e}"

    sigma = max(_error(my_spectra[s].sigma, spectra[s].sigma) for s in spectra)
    moved = [abs(my_ranks[site] - rank) for site, rank in ranks.items()]
    return {
        "R": worst("input_metric"),
        "C": worst("kl_metric"),
        "σ": f"{sigma:.1e}",
        "ranks that differ": f"{sum(map(bool, moved))} of {len(moved)}",
        "by at most": str(max(moved)),
    }


def _error(found: Tensor, exact: Tensor) -> float:
    exact = exact.double().cpu()
    return float((found.double().cpu() - exact).norm() / exact.norm())
