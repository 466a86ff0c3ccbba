"""Carry out one run: load, compress, evaluate, record. Nothing is lost by a crash."""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from iosvd.compression import batch_size, compress_as, factorize_as, loaded
from iosvd.data import calibration_windows, check_vocabulary, evaluation_windows
from iosvd.errors import IosvdError, ModelError, one_line
from iosvd.evaluation.divergence import Context, divergences
from iosvd.evaluation.perplexity import perplexity
from iosvd.evaluation.zero_shot import ZeroShotResult, load_tasks, zero_shot
from iosvd.fingerprints import data_digest, digest, spectra_digest
from iosvd.models import load_config, load_tokenizer
from iosvd.pipeline import Compressed, Factorized, feasible_budget
from iosvd.plan import Plan
from iosvd.recent import Recent, Tokens
from iosvd.records import (
    ANSWERS,
    CHECKPOINT,
    FAILURE,
    METRICS,
    PLAN,
    SPECTRA,
    TRACKED,
    read_record,
    run_folder,
    write_json,
)
from iosvd.replacement import stored_bytes
from iosvd.run import KL, Run
from iosvd.sites import find_sites
from iosvd.stages import Stage, StageClock
from iosvd.tracking import tracked
from iosvd.trials import truncated_weights
from iosvd.versions import commit, library_versions
from iosvd.whitening import predicts_kl

if TYPE_CHECKING:  # transformers' models take seconds to import.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


WHOLE = "the compressed model"  # Beside the names of sites.


class Outcome(Enum):
    """How a run ended."""

    complete = "complete"
    skipped = "skipped"
    failed = "failed"


def execute(run: Run, recent: Recent | None = None) -> Outcome:
    """Carry out a run unless it is complete; a failure is recorded, never raised.

    `metrics.json` is written last. A failure leaves `failure.json` with the traceback, and is
    tried again on the next launch. Runs that are given the same `recent` one after the other share
    what they may.
    """
    recent = recent or Recent()
    folder = run_folder(run)
    try:
        if not run.runtime.force and read_record(folder) is not None:
            log.info("complete already: %s", folder)
            if not (folder / TRACKED).exists():
                with tracked(run, folder):  # Complete before it was to be tracked.
                    pass
            return Outcome.skipped
        log.info("run %s: %s", run.label, folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, FAILURE, TRACKED):
            (folder / name).unlink(missing_ok=True)
        OmegaConf.save(OmegaConf.create(run.config), folder / "config.yaml")
        with tracked(run, folder):
            write_json(folder / METRICS, _measure(run, folder, recent))
    # Whatever one run dies of must not end a sweep of two hundred.
    except Exception as error:  # noqa: BLE001
        _record_failure(error, folder)
        return Outcome.failed
    log.info("complete: %s", folder)
    return Outcome.complete


def _measure(run: Run, folder: Path, recent: Recent) -> dict[str, Any]:
    """Compress and evaluate; return what metrics.json will hold."""
    started = datetime.now(timezone.utc)
    clock = StageClock()
    with clock.stage("data"):
        _check_context(run)
        tokenizer = load_tokenizer(run.model)
        read = recent.tokens.of(data_digest(run), lambda: _tokens(run, tokenizer))
        tokens, texts = read.calibration, read.texts
        tasks = load_tasks(run.eval.zero_shot)
    with clock.stage("load"):
        model = loaded(run)
        for windows in (tokens, *texts.values()):
            check_vocabulary(windows, model.config.get_text_config().vocab_size)
    revision = getattr(model.config, "_commit_hash", None)
    # Before the work: an impossible budget should not cost a pass over the calibration set.
    sites = find_sites(model, run.model.sites)
    feasible_budget(sites, run.ratio, run.quantization, run.min_rank_fraction)
    shared = recent.spectra.has(identity := spectra_digest(run))
    factorized = recent.spectra.of(identity, lambda: factorize_as(run, model, tokens))
    compressed = compress_as(run, model, tokens, factorized)
    compressed.plan.write(folder / PLAN, library_versions())
    save_file({n: s.float().contiguous() for n, s in compressed.sigma.items()}, folder / SPECTRA)
    if run.runtime.save_checkpoint:
        _save_checkpoint(compressed.model, folder / CHECKPOINT, compressed.plan, tokenizer)
    with clock.stage("evaluation"):
        measured = {
            name: perplexity(model, windows, batch_size(run, windows))
            for name, windows in texts.items()
        }
    with clock.stage("zero_shot"):
        limit, requests = run.eval.zero_shot.limit, run.runtime.batch_requests
        accuracy = zero_shot(model, tokenizer, tasks, limit, requests)
    write_json(folder / ANSWERS, accuracy.correct)
    divergence = {}
    if run.eval.kl is not KL.none:
        with clock.stage("divergence"):
            divergence = _divergence(run, compressed, factorized, texts)
    stages = {**clock.stages, **compressed.stages}
    return {
        "digest": digest(run),
        "label": run.label,
        "model": run.model.name,
        "model_revision": revision,
        "ratio": compressed.plan.ratio_asked,
        "target_kl": run.target_kl,
        **_plan_summary(compressed.plan),
        "target_bytes": stored_bytes(model, compressed.plan.sites),
        "perplexity": measured,
        **_accuracy_summary(accuracy),
        **divergence,
        "windows": {name: list(windows.shape) for name, windows in texts.items()},
        "compression_seconds": sum(stage.seconds for stage in compressed.stages.values()),
        "spectra_shared": shared,  # Computed by the run before; the seconds are what that one took.
        "stages": {name: _stage_summary(stage) for name, stage in stages.items()},
        "device": _device_name(model),
        "started": started.isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": library_versions(),
        "config": run.config,
    }


def _tokens(run: Run, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    c = run.calibration
    return Tokens(
        calibration_windows(tokenizer, run.dataset, c.windows, c.seq_len, c.seed),
        {
            name: evaluation_windows(tokenizer, text, run.eval.seq_len, run.eval.windows)
            for name, text in run.eval.texts.items()
        },
    )


def _divergence(
    run: Run, compressed: Compressed, factorized: Factorized, texts: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Measure the exact divergence from the dense model, as `eval.kl` asks for it."""
    dense = loaded(run)
    sites, ranks = find_sites(dense, run.model.sites), compressed.plan.ranks
    variants: dict[str, tuple[PreTrainedModel, Context]] = {WHOLE: (compressed.model, nullcontext)}
    if run.eval.kl is KL.sites:
        for site, rank in ranks.items():
            alone = partial(truncated_weights, sites, factorized.spectra, {site: rank})
            variants[site] = (dense, alone)
    found = {
        name: divergences(dense, variants, _first(windows, run), batch_size(run, windows))
        for name, windows in texts.items()
    }
    whole = {name: asdict(of_text.pop(WHOLE)) for name, of_text in found.items()}
    kl = predicts_kl(run.whitening)
    planned = {
        site: {
            "predicted_kl": plan.dropped_energy / 2 if kl else None,
            "predicted_loss_change": plan.loss_change,
        }
        for site, plan in compressed.plan.sites.items()
    }
    by_site = {
        name: {site: asdict(measured) | planned[site] for site, measured in of_text.items()}
        for name, of_text in found.items()
    }
    return {"divergence": whole, "site_divergence": by_site}


def _first(windows: Tensor, run: Run) -> Tensor:
    return windows[: run.eval.kl_windows] if run.eval.kl_windows else windows


def _accuracy_summary(accuracy: ZeroShotResult) -> dict[str, Any]:
    scores = {name: asdict(score) for name, score in accuracy.scores.items()}
    return {"zero_shot": scores, "average_acc": accuracy.average}


def _plan_summary(plan: Plan) -> dict[str, Any]:
    return {
        "ratio_achieved": plan.ratio_achieved,
        "bits_kept": plan.bits_kept,
        "bits_total": plan.bits_total,
        "parameters_kept": plan.parameters_kept,
        "parameters_total": plan.parameters_total,
        "predicted_kl": plan.predicted_kl,
        "predicted_loss_change": plan.predicted_loss_change,
    }


def _stage_summary(stage: Stage) -> dict[str, float]:
    return {"seconds": round(stage.seconds, 3), "peak_bytes": stage.peak_bytes}


def _save_checkpoint(
    model: PreTrainedModel, folder: Path, plan: Plan, tokenizer: PreTrainedTokenizerBase
) -> None:
    from iosvd.checkpoint import save  # Imports much of transformers.

    if folder.exists():  # Left by a run that ended before its metrics were written.
        shutil.rmtree(folder)
    save(model, folder, plan, tokenizer)


def _check_context(run: Run) -> None:
    """Fail before loading where windows are longer than the model's context."""
    context = getattr(load_config(run.model), "max_position_embeddings", None)
    longest = max(run.calibration.seq_len, run.eval.seq_len)
    if context is not None and longest > context:
        raise ModelError(
            f"windows of {longest} tokens exceed the context of {context} of {run.model.name};"
            f" set model.seq_len={context}"
        )


def _device_name(model: PreTrainedModel) -> str:
    device = model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def _record_failure(error: Exception, folder: Path) -> None:
    known = isinstance(error, IosvdError)
    line = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trace = traceback.format_exception(error)
        write_json(folder / FAILURE, {"error": line, "traceback": "".join(trace)})
        where = "" if known else f" (traceback in {folder / FAILURE})"
    except OSError as second:
        where = f" (and failure.json could not be written: {second.strerror})"
    log.error("failed: %s%s", line, where)
