"""A question about an image, with choices to answer from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

LETTERS = "ABCDEFGHIJ"  # Of choices, in order.


@dataclass(frozen=True)
class Item:
    """One question about one image."""

    name: str  # For messages: where the item is from.
    load: Callable[[], Image]  # Decodes the image; those of a large data set fit no memory.
    question: str
    choices: tuple[str, ...]
    answer: int  # Index of the right choice.
    hint: str = ""
    category: str = ""

    @property
    def image(self) -> Image:
        """The image, decoded at every access."""
        return self.load()
