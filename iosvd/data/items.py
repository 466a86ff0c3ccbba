"""A question about an image, with choices to answer from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

LETTERS = "ABCDEFGHIJ"  # Of choices, in order.


@dataclass(frozen=True)
class Item:
    """One question about one image."""

    name: str  # For messages: where the item is from.
    image: Image
    question: str
    choices: tuple[str, ...]
    answer: int  # Index of the right choice.
    hint: str = ""
    category: str = ""

    @property
    def letter(self) -> str:
        """The letter of the right choice."""
        return LETTERS[self.answer]
