"""Read questions about images: from a local folder, from the hub, or drawn (METHODS 12)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iosvd.data.drawn import SPLITS, drawn_item
from iosvd.data.image_text import Counted, Prompt
from iosvd.data.items import LETTERS, Item
from iosvd.data.texts import Split, rows_of_jsonl
from iosvd.errors import ConfigError, DataError, extra, one_line
from iosvd.system.files import check_no_pointers

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
_DRAWN = 20_000  # Items of a split, unless a run asks for fewer.


@dataclass(frozen=True)
class Fields:
    """Names of an item's fields in a data set."""

    image: str = "image"  # A file's name in a local folder; an image on the hub.
    question: str = "question"
    choices: list[str] = field(default_factory=lambda: ["choices"])  # A list, or one field each.
    answer: str = "answer"  # The index of the right choice, or its letter.
    hint: str | None = "hint"
    category: str | None = "category"

    def __post_init__(self) -> None:
        if not self.choices:
            raise ConfigError("fields.choices is empty; name the list of choices, or a field each")


@dataclass(frozen=True)
class VisualDataset:
    """The source of questions about images, and how they are put to a model."""

    name: str
    path: str | None = None  # A local folder, which takes precedence over the hub.
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    drawn: bool = False  # The items that this project draws.
    fields: Fields = field(default_factory=Fields)
    only: dict[str, str] = field(default_factory=dict)  # Rows whose fields have these values.
    prompt: Prompt = field(default_factory=Prompt)
    counted: Counted = Counted.text  # Predictions that calibrate.
    images: bool = True  # False: the same questions without their images, for calibration.
    calibration: Split = field(default_factory=lambda: Split("train"))
    evaluation: Split = field(default_factory=lambda: Split("test"))


def read_items(dataset: VisualDataset, split: Split) -> list[Item]:
    """Return the items of a split that have an image, in order; every image is decoded once.

    Raises:
        ConfigError: the data set has no source.
        DataError: nothing can be read there, or an item is damaged; it is named.
    """
    return [_checked(item) for item in _listed(dataset, split)]


def chosen_items(dataset: VisualDataset, number: int, seed: int) -> list[Item]:
    """Return a random choice of the calibration split, all different.

    Raises:
        DataError: it has fewer items; or as `read_items`.
    """
    if dataset.drawn and dataset.path is None:  # Every number is an item.
        _check_drawn(dataset.calibration)
        return [drawn_item(dataset.calibration.name, seed * number + i) for i in range(number)]
    items = _listed(dataset, dataset.calibration)
    if len(items) < number:
        raise DataError(
            f"dataset {dataset.name} has {len(items)} questions with an image, {number} are asked"
            " for; lower calibration.windows"
        )
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [_checked(items[i]) for i in order[:number].tolist()]


def _listed(dataset: VisualDataset, split: Split) -> list[Item]:
    """Return the items of a split, whose images have not been looked at."""
    limit = split.max_documents
    if dataset.path is not None:
        rows = _local(local_items(dataset, split))
    elif dataset.drawn:
        _check_drawn(split)
        return [drawn_item(split.name, number) for number in range(limit or _DRAWN)]
    elif dataset.hub_id is not None:
        rows = _hub(dataset, split)
    else:
        raise ConfigError(f"dataset {dataset.name} has no source; set dataset.path=FOLDER")
    items = []
    for name, row in rows:
        asked = all(str(row.get(key)) == value for key, value in dataset.only.items())
        if not asked or row.get(dataset.fields.image) is None:
            continue  # Of another kind, or a question without an image.
        items.append(_item(name, row, dataset))
        if limit and len(items) == limit:
            break
    if not items:
        raise DataError(
            f"split {split.name} of dataset {dataset.name} has no question with an image"
        )
    return items


def _checked(item: Item) -> Item:
    _ = item.image
    return item


def _check_drawn(split: Split) -> None:
    if split.name not in SPLITS:
        raise DataError(f"drawn items have no split {split.name}; there are {', '.join(SPLITS)}")


def local_items(dataset: VisualDataset, split: Split) -> Path:
    """Return the file of a split in a local folder; images are named in it.

    Raises:
        DataError: there is none.
    """
    folder = Path(dataset.path or "")
    path = folder / f"{split.name}.jsonl"
    if not path.is_file():
        raise DataError(
            f"{folder} has no {split.name}.jsonl; it must hold one, with an image, a question,"
            " choices and an answer a line, and the images beside it"
        )
    check_no_pointers(path)
    return path


def _local(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in rows_of_jsonl(path):
        name = f"{number} of {path}"
        if not isinstance(row, dict):
            raise DataError(f"line {name} is no item, but a {type(row).__name__}")
        yield name, row


def _hub(dataset: VisualDataset, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
    with extra("datasets"):
        import datasets
    try:
        found = datasets.load_dataset(
            dataset.hub_id,
            dataset.hub_config,
            split=split.name,
            revision=dataset.revision,
            streaming=split.max_documents > 0,
        )
        rows: Iterable[Mapping[str, Any]] = _undecoded(found, dataset.fields.image)
        for number, row in enumerate(rows):
            yield f"{number} of {dataset.hub_id} ({split.name})", dict(row)
    except DataError:
        raise
    except Exception as error:  # Whatever the hub's client and datasets raise.
        raise DataError(
            f"cannot load {dataset.hub_id} ({split.name}) from the hub: {one_line(error)[:200]};"
            f" to use a local copy set the path of dataset {dataset.name} to a folder"
        ) from error


def _undecoded(rows: Any, image: str) -> Any:
    """Let a data set yield the bytes of its images."""
    import datasets

    kind: Any = (rows.features or {}).get(image)
    plain = datasets.Image(decode=False)
    if isinstance(kind, datasets.Image):
        return rows.cast_column(image, plain)
    if isinstance(getattr(kind, "feature", None), datasets.Image):
        return rows.cast_column(image, type(kind)(plain))
    return rows


def _item(name: str, row: Mapping[str, Any], dataset: VisualDataset) -> Item:
    names = dataset.fields
    choices = _choices(name, row, names)
    return Item(
        name=name,
        load=partial(_decoded, name, _only_image(name, row[names.image]), dataset.path),
        question=str(_needed(name, row, names.question)),
        choices=choices,
        answer=_answer(name, _needed(name, row, names.answer), len(choices)),
        hint=_text(row, names.hint),
        category=_text(row, names.category),
    )


def _text(row: Mapping[str, Any], field_name: str | None) -> str:
    value = None if field_name is None else row.get(field_name)
    return "" if value is None else str(value)


def _needed(name: str, row: Mapping[str, Any], field_name: str) -> Any:
    if row.get(field_name) is None:
        held = ", ".join(row)
        raise DataError(
            f"item {name} has no {field_name} (fields: {held}); set dataset.fields, or leave it out"
        )
    return row[field_name]


def _choices(name: str, row: Mapping[str, Any], names: Fields) -> tuple[str, ...]:
    if len(names.choices) > 1:
        found = [row[field_name] for field_name in names.choices if row.get(field_name) is not None]
    else:
        found = _needed(name, row, names.choices[0])
    if not isinstance(found, list | tuple) or not 2 <= len(found) <= len(LETTERS):
        raise DataError(f"item {name} needs 2 to {len(LETTERS)} choices; leave it out")
    return tuple(map(str, found))


def _answer(name: str, value: Any, choices: int) -> int:
    """Return the index of the right choice, which may be given as its letter."""
    letters = LETTERS[:choices]
    if isinstance(value, str) and len(value) == 1 and value.upper() in letters:
        return letters.index(value.upper())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < choices:
        return value
    raise DataError(
        f"item {name} has the answer {value!r}, which is neither one of {letters} nor an index"
        f" below {choices}"
    )


def _only_image(name: str, value: Any) -> Any:
    """Return an item's image, which may stand in a list of one."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 1:
        raise DataError(f"item {name} has {len(value)} images; only items of one are taken")
    return value[0]


def _decoded(name: str, value: Any, folder: str | None) -> Image:
    """Return an image: a file in a folder, the bytes of one, or an image already."""
    with extra("PIL"):
        from PIL import Image, UnidentifiedImageError
    where = name if folder is None else f"{name} ({value})"
    try:
        if folder is not None:
            found = Image.open(Path(folder) / str(value))
        elif isinstance(value, Mapping):
            found = Image.open(BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
        else:
            found = value
        return found.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"the image of item {where} is missing") from None
    except UnidentifiedImageError:
        raise DataError(f"the image of item {where} is of an unknown format") from None
    except Image.DecompressionBombError:
        raise DataError(f"the image of item {where} is too large to be decoded safely") from None
    except (OSError, SyntaxError, ValueError, AttributeError) as error:
        raise DataError(f"the image of item {where} is damaged: {one_line(error)[:100]}") from error
