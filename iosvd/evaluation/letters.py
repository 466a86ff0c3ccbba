"""Which choice a generated answer names (METHODS 12)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from iosvd.data.items import LETTERS


def chosen(answer: str, choices: Sequence[str], *, lettered: bool = True) -> int | None:
    """Return the index of the choice that an answer names, None if it names none.

    The first of the choices' letters that stands alone, if the question gave them letters; else the
    only choice whose text occurs. The public kits guess at random where this finds nothing; here
    that is a wrong answer.
    """
    letters = LETTERS[: len(choices)]
    if lettered and (alone := re.search(rf"(?<![A-Za-z])[{letters}](?![A-Za-z'])", answer)):
        return letters.index(alone.group())
    text = answer.casefold()
    named = [i for i, choice in enumerate(choices) if _occurs(choice.casefold(), text)]
    return named[0] if len(named) == 1 else None


def _occurs(choice: str, text: str) -> bool:
    return (
        bool(choice.strip()) and re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text) is not None
    )
