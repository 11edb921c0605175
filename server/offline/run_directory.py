"""The output directory of a run: whose it is, what is done, and what is written next.

    run.json        what the run is: input, models, sampling; a second run with the same directory goes on with it
    results.jsonl   a line for each answered row of the input, in the order they were finished
    failed.jsonl    a line for each row that could not be answered, with the reason
    summary.json    written at the end, with summary.png

A lock, which the kernel takes back from a killed process, keeps a second run out.
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
NO_DIFFERENCE = {"source"}
"""Of an identity: an input may be moved or renamed, its digest tells whether it is the same."""


class RunDirectory:
    """A run's directory, locked and open for writing. `done` are the lines of the input that have their record."""

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
        """Keeps what became of a line.

        Raises:
            OfflineError: the disk is full.
        """
        (self._results if isinstance(record, Result) else self._failures).append(record)
        self._count(record)

    def sync(self) -> None:
        """Blocks until all that was written is on the disk."""
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
    """Makes the directory, and keeps it for this process.

    Raises:
        OfflineError: another run has it, or it cannot be made.
    """
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OfflineError(f"A run is writing to {path}; wait for its end, or give another directory") from error
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
    """The directory of the run with that identity, new or to be gone on with; the caller has it `locked`.

    Raises:
        OfflineError: it holds another run, or records that cannot be read.
    """
    _identify(path, identity, accept_changes)
    if retry_failed:
        (path / FAILED).unlink(missing_ok=True)
    directory = RunDirectory(path)
    try:
        yield directory
    finally:
        directory.close()


def manifest(path: Path) -> dict[str, Any]:
    """What run.json says: `runs`, each an identity, the last one that of the newest records.

    Raises:
        OfflineError: there is none.
    """
    try:
        found: dict[str, Any] = from_json((path / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise OfflineError(f"{path} is not the output of nbest batch or nbest rerank: {error}") from error
    return found


def _identify(path: Path, identity: Mapping[str, Any], accept_changes: bool) -> None:
    """Compares the identity with that of the run that was begun here, or writes it down as the first."""
    runs = manifest(path)["runs"] if (path / MANIFEST).exists() else []
    if runs:
        names = (runs[-1].keys() | identity.keys()) - NO_DIFFERENCE
        changed = [name for name in names if runs[-1].get(name) != identity.get(name)]
        if not changed:
            return
        if "input" in changed:
            raise OfflineError(f"{path} holds a run over another input; give that one, or another --out")
        if not accept_changes:
            differences = "; ".join(
                f"{name} was {json.dumps(runs[-1].get(name))} and is {json.dumps(identity.get(name))}"
                for name in sorted(changed)
            )
            raise OfflineError(
                f"{path} was begun differently: {differences}. Give the same again or another --out, or "
                "--accept-changes to do the rest of the lines like this"
            )
    write_whole(path / MANIFEST, json.dumps({"runs": [*runs, dict(identity)]}, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or as it was before.

    Raises:
        OfflineError: it cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OfflineError(f"{path} cannot be written: {os.strerror(error.errno or 0)}; make room") from error
