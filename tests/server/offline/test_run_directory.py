"""The files of a run after a crash or on a full disk, which runs may continue it, and the reading of the input."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from server.offline import run_directory
from server.offline.errors import OfflineError
from server.offline.inputs import examine
from server.offline.journal import Journal, recover
from server.offline.records import Failure
from server.offline.run_directory import RunDirectory, locked, opened

IDENTITY: dict[str, Any] = {"source": "in.jsonl", "input": {"sha256": "0"}, "model": "m", "seed": 0}


def failure(line: int) -> Failure:
    return Failure(custom_id=None, line=line, reason="nö")


def lines_of(path: Path) -> list[int]:
    return [record.line for record in recover(path, Failure)]


def test_only_complete_lines_remain_after_a_crash_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    journal = Journal(path)
    for line in (1, 2, 3):
        journal.append(failure(line))
    journal.close()
    contents = path.read_bytes()
    ends = [offset + 1 for offset, byte in enumerate(contents) if byte == ord("\n")]
    for size in range(len(contents) + 1):
        path.write_bytes(contents[:size])
        complete = sum(end <= size for end in ends)
        assert lines_of(path) == [1, 2, 3][:complete]
        assert path.stat().st_size == ([0, *ends])[complete], "the incomplete line was not removed"


def test_a_line_appended_after_an_incomplete_line_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    path.write_bytes(failure(1).model_dump_json().encode() + b'\n{"line": 2, "rea')
    assert lines_of(path) == [1]
    journal = Journal(path)
    journal.append(failure(3))
    journal.close()
    assert lines_of(path) == [1, 3]


def test_a_damaged_line_before_the_last_is_reported_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    path.write_bytes(b"what?\n" + failure(1).model_dump_json().encode() + b"\n")
    with pytest.raises(OfflineError, match=r"failed\.jsonl:1 is damaged; remove that line"):
        lines_of(path)


def test_a_full_disk_removes_the_incomplete_line_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "failed.jsonl"
    journal = Journal(path)
    journal.append(failure(1))
    write, free_bytes = os.write, [10]

    def write_until_full(file: int, data: memoryview) -> int:
        if not free_bytes[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, data[: free_bytes[0]])
        free_bytes[0] -= written
        return written

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.raises(OfflineError, match=r"No space left on device; finished lines are kept\. Free some disk space"):
        journal.append(failure(2))
    monkeypatch.undo()
    journal.append(failure(3))
    journal.close()
    assert lines_of(path) == [1, 3]


def test_a_second_run_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OfflineError, match="A run is writing to"), locked(tmp_path):
        pass
    with locked(tmp_path):  # the lock has been released
        pass


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OfflineError, match="cannot be used as a directory"), locked(tmp_path / "file"):
        pass


def test_a_run_continues_only_with_the_same_input_and_settings(tmp_path: Path) -> None:
    with opened(tmp_path, IDENTITY) as directory:
        directory.write(failure(4))
    with opened(tmp_path, IDENTITY | {"source": "moved.jsonl"}) as directory:
        assert 4 in directory.done
        assert (len(directory.done), directory.answered, directory.failed) == (1, 0, 1)
    with (
        pytest.raises(
            OfflineError, match=r"other settings: seed was 0 and is 1\. Give the same settings .*--accept-changes"
        ),
        opened(tmp_path, IDENTITY | {"seed": 1}),
    ):
        pass
    with (
        pytest.raises(OfflineError, match="another input"),
        opened(tmp_path, IDENTITY | {"input": 1}, accept_changes=True),
    ):
        pass
    with opened(tmp_path, IDENTITY | {"seed": 1}, accept_changes=True) as directory:
        assert 4 in directory.done
    assert [run["seed"] for run in run_directory.manifest(tmp_path)["runs"]] == [0, 1]


def test_retry_failed_deletes_the_records_of_failed_lines(tmp_path: Path) -> None:
    with opened(tmp_path, IDENTITY) as directory:
        directory.write(failure(4))
    with opened(tmp_path, IDENTITY, retry_failed=True) as directory:
        assert len(directory.done) == 0
    assert len(RunDirectory(tmp_path).done) == 0


def test_lines_are_numbered_from_one_and_blank_lines_are_not_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + b"x" * 50 + b"\nlast")
    source = examine(path)
    assert source.rows == 3
    assert list(source.read(max_line_bytes=20)) == [(1, b'{"a": 1}\n'), (3, b"x" * 21), (4, b"last")]


def test_a_missing_input_or_an_invalid_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="There is no file"):
        examine(tmp_path / "none.jsonl")
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(OfflineError, match="is not a table that can be read"):
        examine(tmp_path / "x.parquet")
