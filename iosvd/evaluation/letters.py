"""Find the choice that a generated answer names (METHODS 12)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from iosvd.data.items import LETTERS

# After an article or a pronoun, A or I, there is a word other than these.
_WORD = r"\s+(?!or\b|and\b|is\b)[a-z]"


def chosen(answer: str, choices: Sequence[str], *, lettered: bool = True) -> int | None:
    """Return the index of the choice that an answer names, None if it names none.

    The first of the choices' letters that stands alone and is no article or pronoun, if the
    question gave them letters; else the only choice whose text occurs. The public kits guess at
    random where this finds nothing; here that is a wrong answer.
    """
    letters = LETTERS[: len(choices)]
    alone = re.search(rf"(?<![A-Za-z])(?![AI]{_WORD})[{letters}](?![A-Za-z'])", answer)
    if lettered and alone:
        return letters.index(alone.group())
    text = answer.casefold()
    named = [i for i, choice in enumerate(choices) if _occurs(choice.casefold(), text)]
    # 3 stands in 3.5, which is then what is meant.
    parts = {i for i in named for j in named if i != j and choices[i] in choices[j]}
    rest = [i for i in named if i not in parts]
    return rest[0] if len(rest) == 1 else None


def _occurs(choice: str, text: str) -> bool:
    return (
        bool(choice.strip()) and re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text) is not None
    )
