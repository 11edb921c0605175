"""Reads the rows of a data set from a file, a directory or the hub.

A source is one of

    FILE.parquet          a table
    any other file        JSONL, one object per line
    DIRECTORY[:SPLIT]     a Hugging Face data set, written by `save_to_disk`, or files that `load_dataset` reads
    ORG/NAME[:SPLIT]      a data set of the Hugging Face hub

A data set with several splits needs the name of one: the split to train or measure on is never guessed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reranker.parquet import TableError, table_rows

Source = str | Path


class DataSourceError(ValueError):
    """There is no such data set, or its split is not named. The message gives the remedy."""


def read_records(source: Source) -> Iterator[tuple[int, Any]]:
    """(number, content) of each row, counted from 1; content is the columns of a table row, or an unparsed JSONL line.

    Raises:
        DataSourceError: the source does not exist, or its split is not named.
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
                raise DataSourceError(f"{path}:{number}: not UTF-8, which JSONL has to be; convert the file") from error
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
        data_set = load_from_disk(name) if saved else load_dataset(name)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataSourceError(f"cannot load the data set {name}: {error}") from error
    if isinstance(data_set, DatasetDict):
        if not split and len(data_set) > 1:
            raise DataSourceError(
                f"{name} has the splits {', '.join(data_set)}; name one, as in {name}:{next(iter(data_set))}"
            )
        split = split or next(iter(data_set))
        if split not in data_set:
            raise DataSourceError(f"{name} has no split {split}; it has {', '.join(data_set)}")
        data_set = data_set[split]
    elif split:
        raise DataSourceError(f"{name} has no splits; leave out :{split}")
    return enumerate(data_set, start=1)
