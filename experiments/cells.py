"""Teach a vision tower what each cell of a drawn image holds, before it is asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, ProcessorMixin

from iosvd.data.drawn import COLOURS, PLACES, SHAPES, drawn_item, things_in


class Cells(nn.Module):
    """A vision tower, its connector, and what they say about each cell: shape, colour, place."""

    SIZES = (len(SHAPES) + 1, len(COLOURS) + 1, len(PLACES))

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(self.SIZES))
        self.features: Any = model.get_image_features
        self.processor = processor

    def loss(self, split: str, numbers: Sequence[int]) -> Tensor:
        """Return the mean cross-entropies of the three, summed, in nats."""
        return sum(
            (cross_entropy(found, right) for found, right in self._both(split, numbers)),
            torch.zeros(()),
        )

    @torch.no_grad()
    def accuracy(self, split: str, numbers: Sequence[int]) -> float:
        """Return the share of cells of which all three are right."""
        rights = [found.argmax(-1) == right for found, right in self._both(split, numbers)]
        return float(torch.stack(rights).all(0).float().mean())

    def _both(self, split: str, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        images = [[drawn_item(split, number).image] for number in numbers]
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        tokens = torch.cat(list(self.features(**pixels).pooler_output))
        found = self.head(tokens.flatten(0, -2)).split(self.SIZES, -1)
        right = torch.tensor([cell for number in numbers for cell in _cells(split, number)])
        return list(zip(found, right.T, strict=True))


def _cells(split: str, number: int) -> list[tuple[int, int, int]]:
    """Return shape, colour and place of every cell; an empty one has neither of the first two."""
    there = {thing.place: thing for thing in things_in(split, number)}
    shapes, colours = ["", *SHAPES], ["", *COLOURS]
    found = []
    for place in range(len(PLACES)):
        shape, colour = (there[place].shape, there[place].colour) if place in there else ("", "")
        found.append((shapes.index(shape), colours.index(colour), place))
    return found
