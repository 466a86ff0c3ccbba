"""One run from beginning to end: load, compress, evaluate."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from iosvd.budget import ENTRY_BITS
from iosvd.cache.spectra import Factorized
from iosvd.data.windows import check_vocabulary
from iosvd.errors import ModelError, RecordError
from iosvd.evaluation.divergence import Context, divergences
from iosvd.layers.reloading import check_reloads
from iosvd.layers.replacement import stored_bytes, truncated_weights
from iosvd.models.loading import gguf_of, hub_revision, load_config
from iosvd.models.sites import cached_widths, find_sites
from iosvd.pipeline import Compressed, compress_to, spectra_for
from iosvd.plan import Plan
from iosvd.runs.compressed import compressed_again
from iosvd.runs.config import config_of
from iosvd.runs.evaluation import Material, evaluation
from iosvd.runs.fingerprints import digest
from iosvd.runs.partial_results import PartialResults
from iosvd.runs.reader import Reader
from iosvd.runs.records import ANSWERS, CHECKPOINT, PLAN, SPECTRA, read_plan
from iosvd.runs.run import KL, Run
from iosvd.runs.steps import batch_size, cache_of, calibration_of, loaded
from iosvd.runs.tokens import calibration_tokens
from iosvd.system.files import remove, written_whole
from iosvd.system.json_files import to_json, write_json
from iosvd.system.timing import Stage, StageClock
from iosvd.system.versions import commit, library_versions
from iosvd.windows import Windows

if TYPE_CHECKING:  # Both take seconds to import.
    from transformers import PreTrainedModel

WHOLE = "the compressed model"  # A key among the names of sites.


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """Compress and evaluate; return the content of metrics.json.

    Args:
        run: what is measured.
        folder: of the run; no other process writes to it.
    """
    started, cache, clock = datetime.now(timezone.utc), cache_of(run), StageClock()
    parts = PartialResults(folder, f"{digest(run)} {commit()}", clock)
    with clock.stage("data"):
        _check_context(run)
        reader = Reader.of(run)
        revision, file = hub_revision(run.model), gguf_of(run.model)
        tokens = calibration_tokens(run, reader, cache, revision)
        material = Material.of(run, reader, cache, revision)
    with clock.stage("load"):
        model = loaded(run)
        for windows in (tokens, *material.texts.values()):
            check_vocabulary(windows.tokens, model.config.get_text_config().vocab_size)
            _check_length(run, windows)
    calibration = calibration_of(run, model, tokens, cache)
    # Before the work: an impossible budget should not cost a pass over the calibration set.
    run.goal.budget(calibration, run.method)
    share = calibration.covered_share
    factorized = spectra_for(run.goal, run.method, calibration)
    compressed = compress_to(run.goal, run.method, calibration, factorized)
    del calibration  # It would keep the layers that were replaced.
    if cache.has_written:
        cache.evict(used_before=started.timestamp())
    _write_plan(compressed, folder)
    if run.runtime.output.save_checkpoint:
        _save_checkpoint(compressed.model, folder / CHECKPOINT, compressed.plan, reader)
    evaluated = evaluation(run, model, reader, material, parts)
    write_json(folder / ANSWERS, evaluated.pop("answers"))
    divergence = _divergence(run, compressed, factorized, material.texts, parts)
    stages = {**clock.stages, **compressed.stages}
    return {
        "digest": digest(run),
        "label": run.label,
        "model": run.model.name,
        "model_revision": revision,
        "model_file": to_json(file),
        "target_kl": run.goal.target_kl,
        **_plan_summary(compressed.plan),
        "covered_share": share,
        "target_bytes": stored_bytes(model, compressed.plan.sites),
        **_other_ratios(model, compressed.plan),
        **evaluated,
        **divergence,
        "windows": {name: list(windows.tokens.shape) for name, windows in material.texts.items()},
        "compression_seconds": sum(stage.seconds for stage in compressed.stages.values()),
        # Cached stages keep the seconds that they took the run that computed them.
        "computed_here": sorted(factorized.computed),
        "stages": {name: _stage_summary(stage) for name, stage in stages.items()},
        "device": _device_name(model),
        "started": started.isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": library_versions(),
        "config": config_of(run),
    }


def save_checkpoint_of(run: Run, folder: Path) -> None:
    """Compress a complete run's model again, from the cache if possible, and save its checkpoint.

    Args:
        run: complete.
        folder: of the run; no other process writes to it.

    Raises:
        RecordError: this version would choose other ranks than the measured ones.
    """
    compressed, reader = compressed_again(run)
    measured = read_plan(folder)["sites"]
    now = {name: asdict(site) for name, site in compressed.plan.sites.items()}
    stored = ("rank", "dense", "bits", "rounded_rows")
    for name, site in now.items():
        if any(site[key] != measured.get(name, {}).get(key) for key in stored):
            raise RecordError(
                f"{name} would not be stored as it was when {folder} was measured, by another"
                " version or device; measure it anew with runtime.force=true"
            )
    _save_checkpoint(compressed.model, folder / CHECKPOINT, compressed.plan, reader)


def _write_plan(compressed: Compressed, folder: Path) -> None:
    compressed.plan.write(folder / PLAN, library_versions())
    sigma = {name: s.float().contiguous() for name, s in compressed.sigma.items()}
    with written_whole(folder / SPECTRA) as temporary:
        save_file(sigma, temporary)


def _divergence(
    run: Run,
    compressed: Compressed,
    factorized: Factorized,
    texts: Mapping[str, Windows],
    parts: PartialResults,
) -> dict[str, Any]:
    """Measure the exact divergence from the dense model, as `eval.kl` asks."""
    if run.eval.kl is KL.none:
        return {}
    ranks = compressed.plan.ranks
    dense_model = functools.cache(lambda: loaded(run))

    def of_text(name: str) -> dict[str, Any]:
        dense = dense_model()
        sites = find_sites(dense, run.model.sites)
        variants: dict[str, tuple[PreTrainedModel, Context]]
        variants = {WHOLE: (compressed.model, nullcontext)}
        if run.eval.kl is KL.sites:
            for site, rank in ranks.items():
                alone = partial(truncated_weights, sites, factorized.spectra, {site: rank})
                variants[site] = (dense, alone)
        windows = _first(texts[name], run)
        found = divergences(dense, variants, windows, batch_size(run, windows))
        return {variant: asdict(value) for variant, value in found.items()}

    found = parts.of("divergence", texts, of_text)
    whole = {name: of_text.pop(WHOLE) for name, of_text in found.items()}
    kl = run.method.whitening.predicts_kl
    planned = {
        site: {
            "predicted_kl": plan.dropped_energy / 2 if kl else None,
            "predicted_loss_change": plan.loss_change,
        }
        for site, plan in compressed.plan.sites.items()
    }
    by_site = {
        name: {site: measured | planned[site] for site, measured in sites.items()}
        for name, sites in found.items()
    }
    return {"divergence": whole, "site_divergence": by_site}


def _first(windows: Windows, run: Run) -> Windows:
    return windows[: run.eval.kl_windows] if run.eval.kl_windows else windows


def _plan_summary(plan: Plan) -> dict[str, Any]:
    return {
        "ratio": plan.ratio_asked,
        "ratio_achieved": plan.ratio_achieved,
        "bits_kept": plan.bits_kept,
        "bits_total": plan.bits_total,
        "parameters_kept": plan.parameters_kept,
        "parameters_total": plan.parameters_total,
        "predicted_kl": plan.predicted_kl,
        "predicted_loss_change": plan.predicted_loss_change,
    }


def _other_ratios(model: PreTrainedModel, plan: Plan) -> dict[str, float]:
    """Return what is kept of the cache of keys and values, and of the whole model's bits."""
    rest = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in plan.sites or name.endswith(".bias")
    )
    kept = sum(site.bits for site in plan.sites.values()) / ENTRY_BITS
    whole = (kept + rest) / (plan.parameters_total + rest)
    widths = cached_widths(model, plan.sites)
    cached = {name: plan.sites[name] for name, width in widths.items() if width}
    entries = sum(widths[name] for name in cached)
    latent = sum(widths[n] if s.dense else min(widths[n], s.rank) for n, s in cached.items())
    return {"whole_ratio": whole, **({"cache_ratio": latent / entries} if entries else {})}


def _stage_summary(stage: Stage) -> dict[str, float]:
    return {"seconds": round(stage.seconds, 3), "peak_bytes": stage.peak_bytes}


def _save_checkpoint(model: PreTrainedModel, folder: Path, plan: Plan, reader: Reader) -> None:
    from iosvd.layers.checkpoint import save  # Imports much of transformers.

    remove(folder)  # Left by a run that ended before its metrics were written.
    save(model, folder, plan, reader.saved)
    try:
        check_reloads(model, folder)
    except BaseException:
        remove(folder)
        raise


def _check_context(run: Run) -> None:
    """Raise ModelError if windows are longer than the model's context."""
    context, longest = _context(run), max(run.data.calibration.seq_len, run.eval.seq_len)
    if context is not None and longest > context:
        raise ModelError(
            f"windows of {longest} tokens exceed the context of {context} of {run.model.name};"
            f" set model.seq_len={context}"
        )


def _check_length(run: Run, windows: Windows) -> None:
    """Raise ModelError if questions, whose length is their own, are longer than the context."""
    context = _context(run)
    if context is not None and windows.length > context:
        raise ModelError(
            f"a question of {windows.length} tokens exceeds the context of {context} of"
            f" {run.model.name}; leave it out of the data set"
        )


def _context(run: Run) -> int | None:
    config = load_config(run.model).get_text_config()
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found


def _device_name(model: PreTrainedModel) -> str:
    device = model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)
