"""The rows of an input, one at a time: lines of JSONL, or rows of a Parquet table.

The input is looked through once before anything is done, for its digest and its number of rows: the first says later
whether a run goes on with the same input, the second how long it takes. Standard input can be read only once, so it is
kept as a file in the output directory first; a run of it can then be taken up again like any other.
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
"""A line as it stands in the file, or the columns of a table's row."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input that has been looked through."""

    path: Path
    sha256: str
    rows: int

    @property
    def is_table(self) -> bool:
        return self.path.suffix == ".parquet"

    def read(self, max_line_bytes: int) -> Iterator[tuple[int, Row]]:
        """(number, row) from 1 on; of a line that is too long its first `max_line_bytes` + 1 bytes.

        Raises:
            OfflineError: it cannot be read to the end.
        """
        try:
            yield from table_rows(self.path) if self.is_table else _lines(self.path, max_line_bytes)
        except (OSError, TableError) as error:
            raise OfflineError(f"{error}; what is done is kept") from error


def examine(path: Path) -> Source:
    """Looks through a file.

    Raises:
        OfflineError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise OfflineError(f"There is no file {path}; give one of JSON lines or a Parquet table, or - for stdin")
    try:
        digest = sha256_of(path)
        source = Source(path, digest, 0)
        rows = _table_length(path) if source.is_table else sum(1 for _ in _lines(path, CHUNK_BYTES))
    except (OSError, TableError) as error:
        raise OfflineError(f"{path} cannot be read: {error}") from error
    return Source(path, digest, rows)


def spool(stream: BinaryIO, directory: Path) -> Path:
    """Keeps a stream as a file, whole or not at all; one that was kept before must be the same.

    Raises:
        OfflineError: it is another one, or it cannot be written.
    """
    path = directory / SPOOL
    try:
        with atomic_write(path) as file:
            shutil.copyfileobj(stream, file, CHUNK_BYTES)
            file.flush()
            if path.exists() and sha256_of(path) != sha256_of(Path(file.name)):
                raise OfflineError(
                    f"{directory} was begun with other lines from stdin; give {path} as the input to go on with those, "
                    "or another --out"
                )
    except OSError as error:
        raise OfflineError(f"stdin cannot be kept in {path}: {os.strerror(error.errno or 0)}; make room") from error
    return path


def _table_length(path: Path) -> int:
    next(iter(table_rows(path)), None)  # which tells what is wrong with it
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as table:
        return int(table.metadata.num_rows)


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank; no more of one is ever in memory than `max_line_bytes` + 1."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(max_line_bytes + 1):
            number += 1
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(CHUNK_BYTES)):
                pass
            if line.strip():
                yield number, line
