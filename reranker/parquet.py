"""Reads the rows of a Parquet table in batches; shared by training and the offline mode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH_ROWS = 1024
"""Rows held in memory at a time."""


class TableError(ValueError):
    """The file is not a readable table, or pyarrow, which reads it, is not installed."""


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, columns) of each row; numbers begin with 1.

    Raises:
        TableError: the file is not a readable table, or pyarrow is not installed. The message says what to do.
        OSError: the file cannot be read.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise TableError(f"reading {path} needs pyarrow, which comes with: pip install 'nbest[train]'") from error

    try:
        with ParquetFile(path) as table:
            rows = (row for batch in table.iter_batches(BATCH_ROWS) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except ArrowException as error:
        raise TableError(f"{path} is not a table that can be read: {error}") from error
