"""Time and peak memory of svd_llm and zs_svd against the authors' way: part of make bench

    python benchmarks/plain_codes.py runtime.batch_tokens=1024

The reference is written out here as the public codes work: one window at a time, float32 sums in
forward hooks, gradient checkpointing where there is a backward pass, an exact float32 SVD of each
whitened weight. Both sides take the same windows, from tokens to the factors of all layers, each in
a process of its own, in turns; of several turns the fastest counts. The model is random, of
SmolLM2-135M's widths and half its blocks. Writes <results>/tables/plain-codes-<device>.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path

import pandas
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from iosvd.errors import exit_in_one_line
from iosvd.pipeline import compress_to
from iosvd.runs.config import compose_run
from iosvd.runs.run import Run
from iosvd.runs.steps import calibration_of, device_for, loaded
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text
from iosvd.system.machine import GIB
from iosvd.system.timing import Stage, measured
from iosvd.system.versions import commit

SHAPE = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=15,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
OPTIONS = ("model=local", "model.dtype=float32", "model.seq_len=512", "calibration.windows=8")
TURNS = 2
RATIO = 0.6


def plain(model: PreTrainedModel, tokens: Tensor, absolute: float, gradient_windows: int) -> None:
    """Profile window by window, then whiten, decompose and truncate every layer.

    Args:
        model: dense; its layers get their truncated factors.
        tokens: (windows, length).
        absolute: added to the diagonal of the mean Gram matrix; 0: its sum is taken undamped.
        gradient_windows: of the loss, whose gradient scores the components; 0: none.
    """
    layers = {
        name: layer
        for name, layer in model.model.layers.named_modules()
        if isinstance(layer, nn.Linear)
    }
    grams: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach().flatten(0, 1).float()
            grams[name] = grams[name] + x.T @ x if name in grams else x.T @ x

        return hook

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for window in tokens:
            model(input_ids=window[None].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(gradient_windows > 0)
    if gradient_windows:
        model.train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        for window in tokens[:gradient_windows]:
            one = window[None].to(model.device)
            model(input_ids=one, labels=one, use_cache=False).loss.backward()
        model.gradient_checkpointing_disable()
    for name, layer in layers.items():
        _truncate(layer, grams.pop(name) / (tokens.numel() if absolute else 1), absolute)


def _truncate(layer: nn.Linear, gram: Tensor, absolute: float) -> None:
    weight, gradient = layer.weight.detach(), layer.weight.grad
    m, n = weight.shape
    root = _root(gram, absolute)
    u, sigma, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    inverse = torch.linalg.inv(root)
    if gradient is not None:  # The scores; how they are ranked costs nothing beside this.
        _ = -sigma * ((u.T @ gradient @ inverse.T) * vh).sum(1)
    rank = int(RATIO * m * n / (m + n))
    half = sigma[:rank].sqrt()
    layer.left, layer.right = u[:, :rank] * half, half[:, None] * (vh[:rank] @ inverse)  # type: ignore[assignment]
    layer.weight.grad = None


def _root(gram: Tensor, absolute: float) -> Tensor:
    """Return the Cholesky root; one that fails gets the least eigenvalue and 1e-6 on top."""
    gram = gram.double()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(gram + absolute * eye)
    if info.item():
        least = torch.linalg.eigvalsh(gram)[0]
        lower = torch.linalg.cholesky(gram + (1e-6 - least) * eye)
    return lower.float()


PLAIN: Mapping[str, tuple[float, int]] = {"svd_llm_public": (0.0, 0), "zs_svd_public": (1e-4, 1)}


def measure_plain(run: Run, tokens: Tensor) -> Stage:
    """Measure the authors' way."""
    model = loaded(run)
    with measured() as took:
        plain(model, tokens, *PLAIN[run.label])
    return took()


def measure_ours(run: Run, tokens: Tensor) -> Stage:
    """Measure the same with the preset."""
    calibration = calibration_of(run, loaded(run), tokens)
    with measured() as took:
        compress_to(run.goal, run.method, calibration)
    return took()


def benchmark(overrides: list[str]) -> str:
    """Measure, write and return the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32).save_pretrained(folder)
        for method in PLAIN:
            more = [f"model.path={folder}", f"method={method}", f"ratio={RATIO}", *overrides]
            run = compose_run([*OPTIONS, *more])
            windows = run.data.calibration
            tokens = torch.randint(0, SHAPE.vocab_size, (windows.windows, windows.seq_len))
            found: dict[str, list[Stage]] = {"plain": [], "ours": []}
            for _ in range(TURNS):
                for name, work in (("plain", measure_plain), ("ours", measure_ours)):
                    # In a process of its own, so that nothing else counts.
                    with get_context("spawn").Pool(1) as pool:
                        found[name].append(pool.apply(work, (run, tokens)))
            rows.append(_row(method, found))
    device = device_for(run.runtime.resources.device)
    table = pandas.DataFrame(rows).to_markdown(index=False, floatfmt=".2f")
    page = (
        f"# svd_llm and zs_svd against the authors' way, {device}\n\n{table}\n\nA random Llama of"
        f" SmolLM2-135M's widths with 15 blocks, float32, {windows.windows} windows of"
        f" {windows.seq_len} tokens; peaks are the process's with the model in it. Ours is below"
        f" the reference where a ratio is below 1. {torch.get_num_threads()} thread(s), commit"
        f" {commit()}, {time.strftime('%Y-%m-%d')}.\n"
    )
    write_text(made(Path(run.runtime.output.results) / "tables") / f"plain-codes-{device}.md", page)
    return page


def _row(method: str, found: Mapping[str, list[Stage]]) -> dict[str, float | str]:
    seconds = {name: min(one.seconds for one in turns) for name, turns in found.items()}
    peaks = {name: min(one.peak_bytes for one in turns) / GIB for name, turns in found.items()}
    return {
        "method": method,
        "plain, s": seconds["plain"],
        "ours, s": seconds["ours"],
        "time, ours / plain": seconds["ours"] / seconds["plain"],
        "plain, GiB": peaks["plain"],
        "ours, GiB": peaks["ours"],
        "memory, ours / plain": peaks["ours"] / peaks["plain"],
    }


if __name__ == "__main__":
    with exit_in_one_line():
        print(benchmark(arguments(__doc__)))
