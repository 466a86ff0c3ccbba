"""Answer a prompt, and measure speed and memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from iosvd.errors import ModelError
from iosvd.inference.cache import held_bytes
from iosvd.inference.memory import cache_bytes_per_token, check_fits, weight_bytes
from iosvd.system.machine import GIB
from iosvd.system.timing import measured

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """Temperature and seed of sampling."""

    temperature: float = 0.0  # 0: the most probable one.
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A model's answer, with its time and memory."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float  # Until the first token.
    decode_seconds: float  # For the others.
    cache_bytes: int
    weight_bytes: int
    peak_bytes: int  # Of the process, or of the GPUs.

    def __str__(self) -> str:
        """Return one line of figures."""
        decoded = (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0
        return (
            f"{self.new_tokens} tokens, {decoded:.1f} a second; prompt of {self.prompt_tokens} in"
            f" {self.prefill_seconds:.2f} s; weights {self.weight_bytes / GIB:.3f} GiB, cache"
            f" {self.cache_bytes / GIB:.4f} GiB, peak {self.peak_bytes / GIB:.2f} GiB"
        )


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
) -> Answer:
    """Generate at most `new` tokens after a prompt.

    Raises:
        ModelError: the prompt is empty, prompt and answer are longer than the context, or the cache
            does not fit.
    """
    from transformers import DynamicCache

    found = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = found["input_ids"]
    if not tokens.numel():
        raise ModelError("the prompt has no tokens; write something")
    _check_context(model, tokens.shape[1], new)
    if cache_bytes_per_token(model):
        check_fits(model, 1, tokens.shape[1] + new)
    cache, clock = DynamicCache(config=model.config), _Clock()
    torch.manual_seed(sampling.seed)
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_k": 0}
    with measured() as took:
        sequences = model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=found["attention_mask"],
            max_new_tokens=new,
            past_key_values=cache,
            streamer=clock,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else None,
            **chosen,
        )
    return Answer(
        text=str(tokenizer.decode(sequences[0, tokens.shape[1] :], skip_special_tokens=True)),
        prompt_tokens=tokens.shape[1],
        new_tokens=sequences.shape[1] - tokens.shape[1],
        prefill_seconds=clock.first,
        decode_seconds=clock.rest,
        cache_bytes=held_bytes(cache),
        weight_bytes=weight_bytes(model),
        peak_bytes=took().peak_bytes,
    )


def _check_context(model: PreTrainedModel, prompt: int, new: int) -> None:
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and prompt + new > context:
        raise ModelError(
            f"the prompt has {prompt} tokens and {new} more are asked for, but the context of the"
            f" model is {context}; shorten the prompt, or take new={max(0, context - prompt)}"
        )


class _Clock:
    """A streamer for `generate` that records when the prompt and each token arrive."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, _: object) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        self._times.append(time.perf_counter())

    @property
    def first(self) -> float:
        """Seconds from the prompt to the first token."""
        return self._times[1] - self._times[0]

    @property
    def rest(self) -> float:
        """Seconds of the other tokens."""
        return self._times[-2] - self._times[1]
