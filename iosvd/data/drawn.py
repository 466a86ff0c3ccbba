"""Image questions that this project draws itself: coloured shapes on a grid of three by three.

Every item is a function of its split and its number alone. An image has one to four shapes, each in
a cell of its own, shifted, of some size, on a noisy ground. Questions ask for a colour, a shape, a
place or a number; of four choices one is right, so chance is a quarter.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Thing:
    """One coloured shape in an image."""

    shape: str
    colour: str
    place: int  # The cell, row by row.


@dataclass(frozen=True)
class Asked:
    """A question about an image, with one right answer."""

    question: str
    right: str
    wrong: Sequence[str]


def drawn_item(split: str, number: int) -> Item:
    """Return the item of this number in a split."""
    generator = _generator(split, number)
    things = _things(generator)
    possible = questions_about(things)
    category = generator.choice(list(possible))
    asked = generator.choice(possible[category])
    choices = [asked.right, *generator.sample(asked.wrong, 3)]
    generator.shuffle(choices)
    return Item(
        name=f"{split} {number}",
        load=partial(_drawn, generator.getstate(), things),
        question=asked.question,
        choices=tuple(choices),
        answer=choices.index(asked.right),
        category=category,
    )


def things_in(split: str, number: int) -> tuple[Thing, ...]:
    """Return what is in an item's image; the embedded model learns to see by it."""
    return _things(_generator(split, number))


def questions_about(things: Sequence[Thing]) -> dict[str, list[Asked]]:
    """Return every question with one right answer, by category."""
    by_shape, by_colour = Counter(t.shape for t in things), Counter(t.colour for t in things)
    alone = [t for t in things if by_shape[t.shape] == 1]
    coloured = [t for t in things if by_colour[t.colour] == 1]
    found = {
        "number": [_asked("How many shapes are there?", NUMBERS[len(things) - 1], NUMBERS)],
        "colour": [_asked(f"What colour is the {t.shape}?", t.colour, COLOURS) for t in alone],
        "place": [_asked(f"Where is the {t.shape}?", PLACES[t.place], PLACES) for t in alone],
        "shape": [_asked(f"Which shape is {t.colour}?", t.shape, SHAPES) for t in coloured],
    }
    return {category: asked for category, asked in found.items() if asked}


def _generator(split: str, number: int) -> random.Random:
    return random.Random(f"{split} {number}")


def _things(generator: random.Random) -> tuple[Thing, ...]:
    places = generator.sample(range(9), generator.randint(1, 4))
    colours = list(COLOURS)
    return tuple(Thing(generator.choice(SHAPES), generator.choice(colours), p) for p in places)


def _asked(question: str, right: str, answers: Iterable[str]) -> Asked:
    return Asked(question, right, [answer for answer in answers if answer != right])


def _drawn(state: Any, things: Sequence[Thing]) -> Image:
    with extra("PIL"):
        from PIL import Image

    generator = random.Random()
    generator.setstate(state)

    size = 3 * CELL
    noise = np.random.default_rng(generator.getrandbits(32)).integers(-18, 19, (size, size, 3))
    pixels = np.full((size, size, 3), generator.randint(20, 70)) + noise
    rows, columns = np.mgrid[:size, :size] + 0.5
    for one in things:
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
