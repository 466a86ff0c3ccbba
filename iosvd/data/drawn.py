"""Image questions that this project draws itself: coloured shapes on a grid of three by three.

Every item is a function of its split and its number alone. An image has one to four shapes, each in
a cell of its own, shifted, of some size, on a noisy ground. Questions ask for a colour, a shape, a
place or a number; of four choices one is right, so chance is a quarter.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from iosvd.data.items import Item
from iosvd.errors import extra

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "validation", "test")
CELL = 16  # Pixels; an image has three by three cells.
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "purple": (170, 60, 200),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = (
    *("top left", "top middle", "top right", "middle left", "centre"),
    *("middle right", "bottom left", "bottom middle", "bottom right"),
)
NUMBERS = ("one", "two", "three", "four")
WORDS = ("colour", "shape", "place", "number")  # Categories of questions.


@dataclass(frozen=True)
class Thing:
    """One coloured shape in an image."""

    shape: str
    colour: str
    place: int  # The cell, row by row.


def drawn_item(split: str, number: int) -> Item:
    """Return the item of this number in a split."""
    generator = _generator(split, number)
    shapes = _shapes(generator)
    question, right, others, category = _question(generator, shapes)
    choices = [right, *generator.sample(others, 3)]
    generator.shuffle(choices)
    return Item(
        name=f"{split} {number}",
        load=partial(_drawn, generator.getstate(), tuple(shapes)),
        question=question,
        choices=tuple(choices),
        answer=choices.index(right),
        category=category,
    )


def description(split: str, number: int) -> str:
    """Return what is in an item's image, cell by cell; the embedded model learns to see by it."""
    there = {one.place: one for one in _shapes(_generator(split, number))}
    cells = (there.get(place) for place in range(9))
    return " ".join("none" if one is None else f"{one.colour} {one.shape}" for one in cells)


def _generator(split: str, number: int) -> random.Random:
    return random.Random(f"{split} {number}")


def _shapes(generator: random.Random) -> list[Thing]:
    count = generator.randint(1, 4)
    places = generator.sample(range(9), count)
    return [
        Thing(generator.choice(SHAPES), generator.choice(list(COLOURS)), place) for place in places
    ]


def _question(generator: random.Random, shapes: Sequence[Thing]) -> tuple[str, str, list[str], str]:
    """Return a question with one right answer, that answer, wrong ones, and the category."""
    by_shape, by_colour = Counter(s.shape for s in shapes), Counter(s.colour for s in shapes)
    alone = [s for s in shapes if by_shape[s.shape] == 1]
    coloured = [s for s in shapes if by_colour[s.colour] == 1]
    possible = ["number", *(["colour", "place"] if alone else []), *(["shape"] if coloured else [])]
    category = generator.choice(possible)
    if category == "number":
        right = NUMBERS[len(shapes) - 1]
        return "How many shapes are there?", right, _without(NUMBERS, right), category
    if category == "shape":
        one = generator.choice(coloured)
        return f"Which shape is {one.colour}?", one.shape, _without(SHAPES, one.shape), category
    one = generator.choice(alone)
    if category == "colour":
        wrong = _without(list(COLOURS), one.colour)
        return f"What colour is the {one.shape}?", one.colour, wrong, category
    right = PLACES[one.place]
    return f"Where is the {one.shape}?", right, _without(PLACES, right), category


def _without(values: Sequence[str], one: str) -> list[str]:
    return [value for value in values if value != one]


def _drawn(state: Any, shapes: Sequence[Thing]) -> Image:
    with extra("PIL"):
        from PIL import Image

    generator = random.Random()
    generator.setstate(state)

    size = 3 * CELL
    noise = np.random.default_rng(generator.getrandbits(32)).integers(-18, 19, (size, size, 3))
    pixels = np.full((size, size, 3), generator.randint(20, 70)) + noise
    rows, columns = np.mgrid[:size, :size] + 0.5
    for one in shapes:
        row, column = divmod(one.place, 3)
        y = rows - (row + 0.5) * CELL - generator.uniform(-1.5, 1.5)
        x = columns - (column + 0.5) * CELL - generator.uniform(-1.5, 1.5)
        inside = _inside(one.shape, x, y, generator.uniform(4.0, 6.0))
        colour = np.array(COLOURS[one.colour]) + [generator.randint(-15, 15) for _ in range(3)]
        pixels[inside] = colour + noise[inside]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _inside(shape: str, x: Any, y: Any, radius: float) -> Any:
    """Return which pixels, at x and y from the middle of a shape, belong to it."""
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.85 * radius
    if shape == "triangle":
        return (y <= 0.8 * radius) & (abs(x) <= (y + radius) / 1.8)
    narrow, long = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    return (narrow <= 0.3 * radius) & (long <= radius)
