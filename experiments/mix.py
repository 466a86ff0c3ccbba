"""Write a calibration text that is in equal parts several others', for dataset=mixed.

    python experiments/mix.py texts=wikitext2,c4 into=FOLDER data=FOLDER

Of each text the calibration split, joined as its own protocol joins it, the longer ones cut at the
end. They are read from folders of `data` that have their names, or without `data` from the hub.
Calibrate on it with dataset=mixed dataset.path=FOLDER.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from iosvd.data.texts import read_documents
from iosvd.errors import ConfigError, exit_in_one_line
from iosvd.runs.config import compose_run, own_option
from iosvd.system.commands import arguments
from iosvd.system.files import made, write_text


def mix(overrides: Sequence[str]) -> str:
    """Write the text, and return a line that says what it holds.

    Raises:
        ConfigError: an option is missing or not known.
        DataError: a text cannot be read.
    """
    names, rest = own_option(overrides, "texts")
    into, rest = own_option(rest, "into")
    data, rest = own_option(rest, "data")
    if names is None or into is None or rest:
        raise ConfigError(f"give texts=NAME,NAME and into=FOLDER{' alone' if rest else ''}")
    texts = [_calibration_text(name, data) for name in names.split(",")]
    length = min(map(len, texts))
    rows = "".join(json.dumps({"text": text[:length]}) + "\n" for text in texts)
    target = made(Path(into)) / "train.jsonl"
    write_text(target, rows)
    return f"{target}: {length:,} characters each of {names}"


def _calibration_text(name: str, data: str | None) -> str:
    place = [] if data is None else [f"dataset.path={Path(data) / name}"]
    dataset = compose_run([f"dataset={name}", *place]).data.text
    return dataset.join.join(read_documents(dataset, dataset.calibration))


if __name__ == "__main__":
    with exit_in_one_line():
        print(mix(arguments(__doc__)))
