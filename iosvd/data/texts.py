"""Read the documents of a data set: from a local folder, from the hub, or from this Python."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from iosvd.data.pydoc import pydoc_documents
from iosvd.errors import ConfigError, DataError, check_at_least, extra, one_line
from iosvd.system.files import check_no_pointers
from iosvd.system.hub_cache import unwritable_cache

log = logging.getLogger(__name__)
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Split:
    """One part of a data set: the hub's split, or the local file `<folder>/<name>.<suffix>`."""

    name: str
    hub_files: str | None = None  # Files of the hub's repository, instead of all of the split.
    max_documents: int = 0  # Only this many first documents; 0: all.

    def __post_init__(self) -> None:
        check_at_least(0, max_documents=self.max_documents)


@dataclass(frozen=True)
class Dataset:
    """The source of a text, and how its documents become one sequence of tokens."""

    name: str
    path: str | None = None  # A local folder, which takes precedence over the hub.
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    builtin: bool = False  # The documentation of this Python (pydoc).
    text_field: str = "text"
    join: str = "\n\n"  # Between documents.
    keep_line_ends: bool = False  # txt: each line keeps its newline, as in the hub's WikiText.
    document_windows: bool = False  # Windows start at documents, BOS first, and never cross them.
    calibration: Split = field(default_factory=lambda: Split("train"))
    evaluation: Split = field(default_factory=lambda: Split("test"))


def read_documents(dataset: Dataset, split: Split) -> list[str]:
    """Return the documents of one split, in order.

    Raises:
        ConfigError: the data set has no source.
        DataError: nothing can be read there; the text says what to set.
    """
    documents: Sequence[str]
    if dataset.path is not None:
        documents = _read_local(local_file(dataset, split), dataset)
    elif dataset.builtin:
        documents = pydoc_documents(split.name)
    elif dataset.hub_id is not None:
        documents = _read_hub(dataset, split)
    else:
        raise ConfigError(f"dataset {dataset.name} has no source; set dataset.path=FOLDER")
    chosen = list(documents[: split.max_documents] if split.max_documents else documents)
    if not any(text.strip() for text in chosen):
        raise DataError(f"split {split.name} of dataset {dataset.name} has no text")
    return chosen


def local_file(dataset: Dataset, split: Split) -> Path:
    """Return the file of a split in a local folder."""
    folder = Path(dataset.path or "")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; dataset.path must hold {split.name}{SUFFIXES}")
    files = [folder / f"{split.name}{suffix}" for suffix in SUFFIXES]
    if found := [path for path in files if path.is_file()]:
        if len(found) > 1:
            others = ", ".join(path.name for path in found[1:])
            log.warning("%s is read, and %s beside it is not", found[0], others)
        check_no_pointers(found[0])
        return found[0]
    held = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)) or "none"
    raise DataError(
        f"{folder} has no {split.name} in txt, jsonl or parquet (found: {held});"
        " set dataset.calibration.name or dataset.evaluation.name to one it has"
    )


def _read_local(path: Path, dataset: Dataset) -> list[str]:
    if path.suffix == ".txt":
        lines = _lines(path)
        # The hub's WikiText rows end in a newline where they are not blank.
        return [f"{x}\n" if x.strip() else "" for x in lines] if dataset.keep_line_ends else lines
    try:
        values = (_of_jsonl if path.suffix == ".jsonl" else _of_parquet)(path, dataset.text_field)
        return _checked(values, f"{path}: row", dataset.text_field)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file, without a byte order mark."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
    if lines[-1] == "":  # After the last newline there is no line.
        lines.pop()
    return lines


def rows_of_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield every line's number and value; blank lines are skipped.

    Raises:
        DataError: a line is no JSON.
    """
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is no JSON: {one_line(error)}") from error
        yield number, row


def _of_jsonl(path: Path, field: str) -> Iterator[Any]:
    """Yield the field of every row."""
    for number, row in rows_of_jsonl(path):
        if not isinstance(row, dict) or field not in row:
            held = ", ".join(row) if isinstance(row, dict) else f"none, but a {_kind(row)}"
            raise _no_field(f"line {number} of {path}", field, held)
        yield row[field]


def _of_parquet(path: Path, field: str) -> Iterator[Any]:
    """Yield the field of every row; no other column is read."""
    with extra("pyarrow"):
        from pyarrow.parquet import ParquetFile
    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise _no_field(str(path), field, ", ".join(names))
        for batch in file.iter_batches(columns=[field]):
            yield from batch.column(0).to_pylist()


def _no_field(where: str, field: str, held: str) -> DataError:
    return DataError(f"{where} has no field {field!r} (fields: {held}); set dataset.text_field")


def _checked(values: Iterable[Any], where: str, field: str) -> list[str]:
    """Return the values of a field.

    Raises:
        DataError: one of them is no text.
    """
    texts = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise DataError(
                f"{where} {number} has a {_kind(value)} in the field {field!r}, not a text; set"
                " dataset.text_field to a field of texts, or make texts of the rows"
            )
        texts.append(value.encode("utf-8", "replace").decode("utf-8"))  # Half of a character.
    return texts


def _kind(value: Any) -> str:
    kinds = {type(None): "null", list: "list", dict: "table", bool: "truth value"}
    return kinds.get(type(value), "number" if isinstance(value, int | float) else "value")


def _read_hub(dataset: Dataset, split: Split) -> list[str]:
    with extra("datasets"):
        import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    options: dict[str, Any] = {"revision": dataset.revision, "streaming": split.max_documents > 0}
    name = split.name
    if split.hub_files is not None:
        # Named files would otherwise be fetched together with all others of the split.
        options["data_files"] = {name: split.hub_files}
    try:
        rows = datasets.load_dataset(dataset.hub_id, dataset.hub_config, split=name, **options)
        texts = (row[dataset.text_field] for row in rows)
        chosen = islice(texts, split.max_documents) if split.max_documents else texts
        return _checked(chosen, f"{dataset.hub_id}: row", dataset.text_field)
    except KeyError:
        raise DataError(
            f"{dataset.hub_id} has no field {dataset.text_field!r}; set dataset.text_field"
        ) from None
    except (
        OSError,
        ValueError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        datasets.exceptions.DatasetsError,
    ) as error:
        if (remedy := unwritable_cache(error)) is not None:
            raise DataError(f"cannot load {dataset.hub_id} ({name}): {remedy}") from error
        raise DataError(
            f"cannot load {dataset.hub_id} ({name}) from the hub:"
            f" {one_line(error)[:200]};"
            f" to use a local copy set the path of dataset {dataset.name} to a folder"
            " (dataset.path=FOLDER, or eval.texts.<name>.path=FOLDER)"
        ) from error
