"""The rows of a Parquet table, a few at a time: the one reader that training and the offline mode share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH_ROWS = 1024
"""Rows in memory at once."""


class TableError(ValueError):
    """The file is not a table that can be read, or what reads it is not installed."""


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, columns) of each row, from 1 on.

    Raises:
        TableError: with the way out.
        OSError: the file cannot be read.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise TableError(f"{path} needs pyarrow, which comes with: pip install 'nbest[train]'") from error

    try:
        with ParquetFile(path) as table:
            rows = (row for batch in table.iter_batches(BATCH_ROWS) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except ArrowException as error:
        raise TableError(f"{path} is not a table that can be read: {error}") from error
