"""Token windows with padding masks and images: the input of a model's forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iosvd.errors import DataError

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

IGNORED = -100  # The label of a position whose prediction does not count; torch's own.


@dataclass(frozen=True)
class Windows:
    """Windows of tokens; those of unequal length are padded at their ends.

    No attention mask goes with them: attention is causal, so padding at the end reaches nothing
    before it. What reads hidden states or predictions asks here which positions are real.
    """

    tokens: Tensor  # (windows, length)
    filled: Tensor | None = None  # (windows, length), False for padding; None: there is none.
    counted: Tensor | None = None  # (windows, length), whose predictions count; None: all.
    beside: tuple[Mapping[str, Tensor], ...] = ()  # What else each window gives the model: images.

    def __post_init__(self) -> None:
        for mask in (self.filled, self.counted):
            if mask is not None and (mask.shape != self.tokens.shape or mask.dtype != torch.bool):
                raise DataError(
                    f"windows of {tuple(self.tokens.shape)} tokens need masks of this shape and of"
                    f" dtype bool, not {tuple(mask.shape)} of {mask.dtype}"
                )
        if self.filled is not None:
            if bool((~self.filled[:, :-1] & self.filled[:, 1:]).any()):
                raise DataError("windows must be padded at their ends (padding_side='right')")
            if self.counted is None or bool((self.counted & ~self.filled).any()):
                raise DataError("padding has no predictions: `counted` must leave it out")
        if self.beside and len(self.beside) != len(self.tokens):
            raise DataError(
                f"{len(self.tokens)} windows need as many sets of images, not {len(self.beside)}"
            )
        if len({frozenset(one) for one in self.beside}) > 1:
            raise DataError("all windows need the same kinds of inputs beside their tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice | Tensor) -> Windows:
        beside = self.beside
        if beside:
            indices = torch.arange(len(self))[which.cpu() if isinstance(which, Tensor) else which]
            beside = tuple(beside[i] for i in indices.tolist())
        filled, counted = (m if m is None else m[which] for m in (self.filled, self.counted))
        return Windows(self.tokens[which], filled, counted, beside)

    def split(self, size: int) -> Iterator[Windows]:
        """Yield consecutive parts of at most `size` windows."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def length(self) -> int:
        """Positions of a window, with padding."""
        return self.tokens.shape[1]

    @property
    def token_counts(self) -> Tensor:
        """The number of tokens that are no padding, by window."""
        if self.filled is None:
            return torch.full((len(self),), self.length)
        return self.filled.sum(1).cpu()

    @property
    def positions(self) -> Tensor:
        """The number of positions whose prediction counts, by window."""
        if self.counted is None:
            return torch.full((len(self),), self.length)
        return self.counted.sum(1).cpu()

    @property
    def predictions(self) -> Tensor:
        """The number of those that have a next token, by window: the terms of the loss."""
        return (self.labels != IGNORED).sum(1).cpu()

    @cached_property
    def labels(self) -> Tensor:
        """The token after every position, (windows, length); IGNORED after the last one.

        And where predictions do not count.
        """
        last = torch.full_like(self.tokens[:, :1], IGNORED)
        labels = torch.cat([self.tokens[:, 1:], last], dim=1)
        if self.filled is not None:  # Padding is no token to predict.
            labels = labels.where(self.filled.roll(-1, 1), IGNORED)
        return labels if self.counted is None else labels.where(self.counted, IGNORED)

    def chosen(self, values: Tensor) -> Tensor:
        """Return what belongs to the positions that count, (1, positions, …) if not all do.

        Args:
            values: (windows, length, …), such as logits or labels.
        """
        if self.counted is None:
            return values
        return values[self.counted.to(values.device)][None]

    def from_position(self, first: int) -> Windows:
        """Return these windows, of which only predictions from a position on count."""
        if first == 0:
            return self
        late = (torch.arange(self.length, device=self.tokens.device) >= first).expand_as(
            self.tokens
        )
        return replace(self, counted=late if self.counted is None else self.counted & late)

    def few(self) -> Windows:
        """Return the first window's first tokens, or all of it if images stand in it."""
        first = self[:1]
        return first if first.beside else Windows(first.tokens[:, :8])

    def output(self, model: PreTrainedModel, **options: Any) -> Any:
        """Return what the model makes of these windows, on its device and without a cache."""
        beside = {name: x.to(model.device) for name, x in _together(self.beside).items()}
        tokens = self.tokens.to(model.device)
        return model(input_ids=tokens, **beside, use_cache=False, **options)

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Return the logits, (windows, length, vocabulary)."""
        logits: Tensor = self.output(model).logits
        return logits

    def with_image_gradients(self) -> Windows:
        """Return these windows with pixels that ask for a gradient, which then goes through them.

        Without it a vision tower keeps no graph, for no parameter asks for a gradient.
        """
        beside = tuple(
            {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in one.items()}
            for one in self.beside
        )
        return replace(self, beside=beside)


def as_windows(tokens: Tensor | Windows) -> Windows:
    """Return windows of plain tokens (windows, length) as what they are, and others as given."""
    return tokens if isinstance(tokens, Windows) else Windows(tokens)


def _together(beside: tuple[Mapping[str, Tensor], ...]) -> dict[str, Tensor]:
    """Join what several windows give the model along the first dimension, padded with zeros."""
    return {name: _joined([one[name] for one in beside]) for name in (beside[0] if beside else ())}


def _joined(tensors: list[Tensor]) -> Tensor:
    largest = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]
    if all(list(x.shape[1:]) == largest for x in tensors):
        return torch.cat(tensors)
    padded = []
    for x in tensors:
        room = x.new_zeros((len(x), *largest))
        room[tuple(slice(size) for size in x.shape)] = x
        padded.append(room)
    return torch.cat(padded)
