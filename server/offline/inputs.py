"""Reads the rows of an input one at a time: lines of JSONL, or rows of a Parquet table.

The input is read once before the run starts, for its SHA-256 and its number of rows. The digest shows whether a
continued run has the same input, and the number is the total of the progress bar. Standard input can be read only once,
so it is first copied to a file in the output directory; such a run can be continued like any other.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reranker.fsio import atomic_write, sha256_of
from reranker.parquet import TableError, table_rows
from server.offline.errors import OfflineError

CHUNK_BYTES = 1 << 20
SPOOL = "stdin.jsonl"

Row = bytes | dict[str, Any]
"""The bytes of a line, or the columns of a table's row."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input, its digest and its number of rows."""

    path: Path
    sha256: str
    rows: int

    @property
    def is_table(self) -> bool:
        return self.path.suffix == ".parquet"

    def read(self, max_line_bytes: int) -> Iterator[tuple[int, Row]]:
        """Yields (line number from 1, row); of a line that is too long, the first `max_line_bytes` + 1 bytes.

        Raises:
            OfflineError: the file cannot be read to the end.
        """
        try:
            yield from table_rows(self.path) if self.is_table else _lines(self.path, max_line_bytes)
        except (OSError, TableError) as error:
            raise OfflineError(f"{error}; finished lines are kept") from error


def examine(path: Path) -> Source:
    """Reads a file once, for its digest and its number of rows.

    Raises:
        OfflineError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise OfflineError(f"There is no file {path}; give a file of JSON lines or a Parquet table, or - for stdin")
    try:
        digest = sha256_of(path)
        source = Source(path, digest, 0)
        rows = _table_length(path) if source.is_table else sum(1 for _ in _lines(path, CHUNK_BYTES))
    except (OSError, TableError) as error:
        raise OfflineError(f"{path} cannot be read: {error}") from error
    return Source(path, digest, rows)


def spool(stream: BinaryIO, directory: Path) -> Path:
    """Copies a stream to a file in the directory, atomically; a file from an earlier run must have the same bytes.

    Raises:
        OfflineError: the earlier file differs, or the file cannot be written.
    """
    path = directory / SPOOL
    try:
        with atomic_write(path) as file:
            shutil.copyfileobj(stream, file, CHUNK_BYTES)
            file.flush()
            if path.exists() and sha256_of(path) != sha256_of(Path(file.name)):
                raise OfflineError(
                    f"{directory} holds a run of other lines from stdin; give {path} as the input to continue that "
                    "run, or another --out"
                )
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OfflineError(f"stdin cannot be stored in {path}: {reason}; free some disk space") from error
    return path


def _table_length(path: Path) -> int:
    next(iter(table_rows(path)), None)  # raises a TableError that says what is wrong with the file
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as table:
        return int(table.metadata.num_rows)


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not blank, with their numbers; at most `max_line_bytes` + 1 bytes of each are kept."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(max_line_bytes + 1):
            number += 1
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(CHUNK_BYTES)):
                pass
            if line.strip():
                yield number, line
