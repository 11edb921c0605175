"""The rows of a data set, wherever it is kept.

A source is one of

    FILE.parquet          a table
    any other file        JSONL, one object a line
    DIRECTORY[:SPLIT]     a Hugging Face data set, as `save_to_disk` leaves it or as files that `load_dataset` knows
    ORG/NAME[:SPLIT]      the same from the hub

A data set of several splits needs the name of one; nothing is trained or measured on a split nobody asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reranker.parquet import TableError, table_rows

Source = str | Path


class DataSourceError(ValueError):
    """There is no such data set, or it does not tell which part of it is meant. The message says the way out."""


def read_records(source: Source) -> Iterator[tuple[int, Any]]:
    """(number, content) of each row from 1 on: the columns of a table, or a line of JSONL still to be parsed.

    Raises:
        DataSourceError: the source cannot be found, or its split is not told.
        OSError: the file cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return _table(path) if path.suffix == ".parquet" else _lines(path)
    name, _, split = str(source).partition(":")
    if not Path(name).is_dir() and (path.suffix in {".jsonl", ".json", ".parquet"} or name.count("/") != 1):
        raise DataSourceError(f"there is no file or directory {source}; give one, or a data set of the hub as ORG/NAME")
    return _data_set(name, split)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataSourceError(f"{path}:{number}: not UTF-8, so no JSONL; convert the file") from error
            if text.strip():
                yield number, text


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from table_rows(path)
    except TableError as error:
        raise DataSourceError(str(error)) from error


def _data_set(name: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    saved = any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
    try:
        found = load_from_disk(name) if saved else load_dataset(name)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataSourceError(f"cannot load the data set {name}: {error}") from error
    if isinstance(found, DatasetDict):
        if not split and len(found) > 1:
            raise DataSourceError(
                f"{name} has the splits {', '.join(found)}; name one, as in {name}:{next(iter(found))}"
            )
        split = split or next(iter(found))
        if split not in found:
            raise DataSourceError(f"{name} has no split {split}; it has {', '.join(found)}")
        found = found[split]
    elif split:
        raise DataSourceError(f"{name} has no splits; leave out :{split}")
    return enumerate(found, start=1)
