"""Talk to a compressed model: make generate MODEL=… PROMPT="…"

    python experiments/generate.py model=tiny method=io_svd ratio=0.6 "prompt=def main():"
    python experiments/generate.py model=local model.path=CHECKPOINT inference=kv_latent prompt=…

`model` is dense, and compressed as that run does it (from the cache, if it was done before), or a
compressed checkpoint. Without a prompt, every line of standard input is one. new: most tokens of an
answer (128); temperature: 0 takes the most probable token; compare=true, or for a checkpoint
compare=FOLDER of the dense model: its answer beside it. inference=plain, v_latent or kv_latent.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from iosvd.errors import ConfigError, exit_in_one_line
from iosvd.inference.prepare import Inference, prepare_for_generation
from iosvd.inference.session import Sampling, answer
from iosvd.models.loading import load_model
from iosvd.options import typed_group
from iosvd.runs.composition import compose
from iosvd.runs.compressed import compressed_model
from iosvd.runs.config import compose_run, group_of, own_option
from iosvd.runs.run import Run
from iosvd.runs.steps import device_for
from iosvd.system.commands import arguments
from iosvd.system.logs import log_to_console

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULTS = {"prompt": "", "new": "128", "temperature": "0", "compare": "false"}


@dataclass(frozen=True)
class Options:
    """Prompts, and how to generate and compare the answers."""

    prompts: Sequence[str] | Iterator[str]
    new: int
    sampling: Sampling
    compare: str
    inference: Inference


def generate(overrides: list[str]) -> None:
    """Print the answers and their figures."""
    options, rest = _options(overrides)
    run = compose_run(rest)
    models, tokenizer = _models(run, options)
    for prompt in options.prompts:
        for name, model in models.items():
            result = answer(model(), tokenizer, prompt, options.new, options.sampling)
            title = f"── {name} " if len(models) > 1 else ""
            print(f"{title}\n{result.text}\n\n[{result}]\n", flush=True)


def _options(overrides: list[str]) -> tuple[Options, list[str]]:
    """Return the options of this command, and the overrides of the run."""
    given, rest = {}, [line for line in overrides if group_of(line) != "inference"]
    for name, default in DEFAULTS.items():
        found, rest = own_option(rest, name)
        given[name] = default if found is None else found
    mine = [line for line in overrides if group_of(line) == "inference"]
    group = [line for line in mine if line.startswith("inference=")] or ["inference=plain"]
    dotted = [line for line in mine if line.startswith("inference.")]
    composed = compose([f"+{group[-1]}", *dotted])
    try:
        new, temperature = int(given["new"]), float(given["temperature"])
    except ValueError as error:
        raise ConfigError(f"new is a whole number and temperature a number: {error}") from None
    if new < 1 or temperature < 0:
        raise ConfigError(f"new={new} is below 1, or temperature={temperature:g} below 0")
    lines = (line.strip() for line in sys.stdin)
    prompts = [given["prompt"]] if given["prompt"] else (line for line in lines if line)
    inference = typed_group(Inference, composed, "inference")
    return Options(prompts, new, Sampling(temperature), given["compare"], inference), rest


def _models(
    run: Run, options: Options
) -> tuple[dict[str, Callable[[], PreTrainedModel]], PreTrainedTokenizerBase]:
    """Return the models that answer, by name, and their tokenizer.

    The dense one is loaded when it answers first, after the compressed one was measured.
    """
    compare, compressed = options.compare, compressed_model(run)
    model, tokenizer = compressed.model, compressed.tokenizer
    how = options.inference
    prepare_for_generation(model, how.v_cache, how.k_cache, how.packed)
    models: dict[str, Callable[[], PreTrainedModel]] = {compressed.name: lambda: model}
    if compare == "false":
        return models, tokenizer
    if compare == "true" and compressed.from_checkpoint:
        raise ConfigError(
            "a checkpoint does not hold the dense model; set compare=FOLDER of the dense one"
        )
    dense = run.model if compare == "true" else dataclasses.replace(run.model, path=compare)
    device = device_for(run.runtime.resources.device)
    return {**models, "dense": cache(lambda: load_model(dense, device))}, tokenizer


if __name__ == "__main__":
    with exit_in_one_line():
        log_to_console()
        generate(arguments(__doc__))
