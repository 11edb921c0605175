"""The output directory of a run: its identity, the finished lines, and the files that records are appended to.

    run.json        the run's identity: input, models, sampling; the same command in the same directory continues it
    results.jsonl   a line for each answered row of the input, in the order in which they finished
    failed.jsonl    a line for each row that could not be answered, with the reason
    summary.json    written at the end, with summary.png

A file lock, which the kernel releases when a process is killed, keeps a second run out.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic_core import from_json

from reranker.fsio import atomic_write
from server.offline.custom_ids import LineSet
from server.offline.errors import OfflineError
from server.offline.journal import Journal, recover
from server.offline.records import Failure, Result

RESULTS, FAILED, MANIFEST, SUMMARY = "results.jsonl", "failed.jsonl", "run.json", "summary.json"
NOT_COMPARED = {"source"}
"""Fields of an identity that may change: an input may be moved or renamed, since its digest is compared."""


class RunDirectory:
    """A run's directory, open for writing; the caller has it `locked`. `done` are the lines that have a record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = LineSet()
        self.answered = 0
        for result in recover(path / RESULTS, Result):
            self._count(result)
        for failure in recover(path / FAILED, Failure):
            self._count(failure)
        self._results = Journal(path / RESULTS)
        self._failures = Journal(path / FAILED)

    @property
    def failed(self) -> int:
        return len(self.done) - self.answered

    def write(self, record: Result | Failure) -> None:
        """Appends the record of a line to its file.

        Raises:
            OfflineError: the disk is full.
        """
        (self._results if isinstance(record, Result) else self._failures).append(record)
        self._count(record)

    def sync(self) -> None:
        """Blocks until all records are on the disk.

        Raises:
            OfflineError: the disk cannot be written.
        """
        self._results.sync()
        self._failures.sync()

    def close(self) -> None:
        self._results.close()
        self._failures.close()

    def _count(self, record: Result | Failure) -> None:
        self.done.add(record.line)
        self.answered += isinstance(record, Result)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Makes the directory if it does not exist, and locks it for this process.

    Raises:
        OfflineError: another run has the lock, or the directory cannot be made.
    """
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OfflineError(f"A run is writing to {path}; wait until it ends, or give another directory") from error
    except OSError as error:
        raise OfflineError(f"{path} cannot be used as a directory: {error.strerror}; give another --out") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def opened(
    path: Path, identity: Mapping[str, Any], *, accept_changes: bool = False, retry_failed: bool = False
) -> Iterator[RunDirectory]:
    """The directory of a run with that identity, new or continued; the caller has it `locked`.

    With `retry_failed` the records of failed lines are deleted, so that those lines run again. With `accept_changes`
    the identity may differ from the stored one in everything but the input.

    Raises:
        OfflineError: the directory holds another run, or records that cannot be read.
    """
    _check_identity(path, identity, accept_changes)
    if retry_failed:
        (path / FAILED).unlink(missing_ok=True)
    directory = RunDirectory(path)
    try:
        yield directory
    finally:
        directory.close()


def manifest(path: Path) -> dict[str, Any]:
    """The contents of run.json: `runs`, a list of identities, of which the last belongs to the newest records.

    Raises:
        OfflineError: there is no such file, or it is not JSON.
    """
    try:
        contents: dict[str, Any] = from_json((path / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise OfflineError(f"{path} is not the output of nbest batch or nbest rerank: {error}") from error
    return contents


def _check_identity(path: Path, identity: Mapping[str, Any], accept_changes: bool) -> None:
    """Compares the identity with the latest one in run.json; adds it there if it is new or was changed."""
    runs = manifest(path)["runs"] if (path / MANIFEST).exists() else []
    if runs:
        names = (runs[-1].keys() | identity.keys()) - NOT_COMPARED
        changed = [name for name in names if runs[-1].get(name) != identity.get(name)]
        if not changed:
            return
        if "input" in changed:
            raise OfflineError(f"{path} holds a run of another input; give that input, or another --out")
        if not accept_changes:
            differences = "; ".join(
                f"{name} was {json.dumps(runs[-1].get(name))} and is {json.dumps(identity.get(name))}"
                for name in sorted(changed)
            )
            raise OfflineError(
                f"{path} holds a run with other settings: {differences}. Give the same settings or another --out, or "
                "--accept-changes to run the remaining lines with the new settings"
            )
    write_text(path / MANIFEST, json.dumps({"runs": [*runs, dict(identity)]}, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: it is complete, or as it was before.

    Raises:
        OfflineError: it cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OfflineError(f"{path} cannot be written: {reason}; free some disk space") from error
