"""An append-only file of JSON lines that a crash at any byte leaves usable.

A line is written by one `write` at the end of the file, so a killed process leaves whole lines and at most one torn at
the end, which `recover` cuts off. A full disk is the same: the part that was written is taken back at once, and the
lines before it stay. What the kernel holds survives the death of the process; for that of the machine, `sync` is called
now and then, and what it had not reached is simply done again.
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
            OfflineError: it cannot be written; the file is as it was before.
        """
        rest = memoryview(record.model_dump_json(exclude_unset=True).encode() + b"\n")
        whole = os.fstat(self._file).st_size
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, whole)
            raise self._refused(error) from error

    def sync(self) -> None:
        """Blocks until the machine itself may die.

        Raises:
            OfflineError: the disk does not take it.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._file)

    def _refused(self, error: OSError) -> OfflineError:
        return OfflineError(
            f"{self.path} cannot be written: {os.strerror(error.errno or 0)}; what is done is kept, make room and give "
            "the same command again"
        )


def recover(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of a file that a run may have left in the middle of a line, which is cut off.

    Raises:
        OfflineError: a line before the last is damaged, which no crash of ours does.
    """
    if not path.exists():
        return
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = kind.model_validate_json(line)
            except ValidationError as error:
                raise OfflineError(
                    f"{path}:{number} is damaged; remove that line, and the same command does it again"
                ) from error
            whole += len(line)
            yield record
    if whole < path.stat().st_size:
        os.truncate(path, whole)
