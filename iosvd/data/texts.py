"""Read the documents of a data set: from a local folder, from the hub, or from this Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from iosvd.data.pydoc import pydoc_documents
from iosvd.errors import ConfigError, DataError, check_at_least, extra, one_line

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
    found = [folder / f"{split.name}{suffix}" for suffix in SUFFIXES]
    for path in found:
        if path.is_file():
            return path
    held = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)) or "none"
    raise DataError(
        f"{folder} has no {split.name} in txt, jsonl or parquet (found: {held});"
        " set dataset.calibration.name or dataset.evaluation.name to one it has"
    )


def _read_local(path: Path, dataset: Dataset) -> list[str]:
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
        if lines[-1] == "":  # After the last newline there is no line.
            lines.pop()
        # The hub's WikiText rows end in a newline where they are not blank.
        return [f"{x}\n" if x.strip() else "" for x in lines] if dataset.keep_line_ends else lines
    with extra("pandas"):
        import pandas
    try:
        table = (
            pandas.read_json(path, lines=True, dtype=False)
            if path.suffix == ".jsonl"
            else pandas.read_parquet(path)
        )
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error
    if dataset.text_field not in table:
        raise DataError(
            f"{path} has no field {dataset.text_field!r} (fields: {', '.join(map(str, table))});"
            " set dataset.text_field"
        )
    texts = table[dataset.text_field]
    if texts.isna().any():
        raise DataError(f"{path} has rows without {dataset.text_field}; remove them")
    return [str(text) for text in texts]


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
        return list(islice(texts, split.max_documents) if split.max_documents else texts)
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
        raise DataError(
            f"cannot load {dataset.hub_id} ({name}) from the hub:"
            f" {one_line(error)[:200]};"
            f" to use a local copy set the path of dataset {dataset.name} to a folder"
            " (dataset.path=FOLDER, or eval.texts.<name>.path=FOLDER)"
        ) from error
