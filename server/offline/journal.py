"""An append-only file of JSON lines that stays usable after a crash at any byte.

A line is written at the end of the file by one `write`, so a killed process leaves complete lines and at most one
incomplete line at the end, which `recover` removes. When the disk is full, the incomplete line is removed at once, and
the lines before it stay. Data that the kernel holds survives the death of the process. Against a crash of the machine,
`sync` is called regularly; lines written after the last sync may be lost, and are then run again.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from server.offline.errors import OfflineError

Record = TypeVar("Record", bound=BaseModel)


class Journal:
    """The file, open for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, record: BaseModel) -> None:
        """Adds a line.

        Raises:
            OfflineError: the line cannot be written; the file is as it was before.
        """
        rest = memoryview(record.model_dump_json(exclude_unset=True).encode() + b"\n")
        size = os.fstat(self._file).st_size
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, size)
            raise self._write_error(error) from error

    def sync(self) -> None:
        """Blocks until all lines are on the disk, so that they survive a crash of the machine.

        Raises:
            OfflineError: the disk cannot be written.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._file)

    def _write_error(self, error: OSError) -> OfflineError:
        return OfflineError(
            f"{self.path} cannot be written: {os.strerror(error.errno or 0)}; finished lines are kept. Free some disk "
            "space and run the same command again"
        )


def recover(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yields the records of a file, and removes an incomplete last line. A file that does not exist has no records.

    Raises:
        OfflineError: a line before the last is damaged, which a crash of this program does not cause.
    """
    if not path.exists():
        return
    complete_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = kind.model_validate_json(line)
            except ValidationError as error:
                raise OfflineError(
                    f"{path}:{number} is damaged; remove that line and run the same command, which answers it again"
                ) from error
            complete_bytes += len(line)
            yield record
    if complete_bytes < path.stat().st_size:
        os.truncate(path, complete_bytes)
