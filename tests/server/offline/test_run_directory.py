"""What a crash leaves behind, and who may go on with it."""

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
    return [one.line for one in recover(path, Failure)]


def test_whatever_byte_a_write_ended_at_only_whole_lines_are_left(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    journal = Journal(path)
    for line in (1, 2, 3):
        journal.append(failure(line))
    journal.close()
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        assert lines_of(path) == [1, 2, 3][:kept]
        assert path.stat().st_size == ([0, *ends])[kept], "the torn line was not cut off"


def test_a_line_after_a_torn_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    path.write_bytes(failure(1).model_dump_json().encode() + b'\n{"line": 2, "rea')
    assert lines_of(path) == [1]
    journal = Journal(path)
    journal.append(failure(3))
    journal.close()
    assert lines_of(path) == [1, 3]


def test_damage_before_the_last_line_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    path.write_bytes(b"what?\n" + failure(1).model_dump_json().encode() + b"\n")
    with pytest.raises(OfflineError, match=r"failed\.jsonl:1 is damaged; remove that line"):
        lines_of(path)


def test_a_full_disk_takes_the_torn_line_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "failed.jsonl"
    journal = Journal(path)
    journal.append(failure(1))
    write, room = os.write, [10]

    def write_until_full(file: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.raises(OfflineError, match="No space left on device; what is done is kept, make room"):
        journal.append(failure(2))
    monkeypatch.undo()
    journal.append(failure(3))
    journal.close()
    assert lines_of(path) == [1, 3]


def test_a_second_run_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OfflineError, match="A run is writing to"), locked(tmp_path):
        pass
    with locked(tmp_path):  # free again
        pass


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OfflineError, match="cannot be used as a directory"), locked(tmp_path / "file"):
        pass


def test_a_run_goes_on_only_with_what_it_was_begun_with(tmp_path: Path) -> None:
    with opened(tmp_path, IDENTITY) as begun:
        begun.write(failure(4))
    with opened(tmp_path, IDENTITY | {"source": "moved.jsonl"}) as again:
        assert 4 in again.done
        assert (len(again.done), again.answered, again.failed) == (1, 0, 1)
    with (
        pytest.raises(
            OfflineError, match=r"begun differently: seed was 0 and is 1. Give the same again .*--accept-changes"
        ),
        opened(tmp_path, IDENTITY | {"seed": 1}),
    ):
        pass
    with (
        pytest.raises(OfflineError, match="another input"),
        opened(tmp_path, IDENTITY | {"input": 1}, accept_changes=True),
    ):
        pass
    with opened(tmp_path, IDENTITY | {"seed": 1}, accept_changes=True) as changed:
        assert 4 in changed.done
    assert [run["seed"] for run in run_directory.manifest(tmp_path)["runs"]] == [0, 1]


def test_failed_lines_are_done_again_where_that_is_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path, IDENTITY) as begun:
        begun.write(failure(4))
    with opened(tmp_path, IDENTITY, retry_failed=True) as again:
        assert len(again.done) == 0
    assert len(RunDirectory(tmp_path).done) == 0


def test_lines_are_numbered_as_an_editor_does_and_blank_ones_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + b"x" * 50 + b"\nlast")
    source = examine(path)
    assert source.rows == 3
    assert list(source.read(max_line_bytes=20)) == [(1, b'{"a": 1}\n'), (3, b"x" * 21), (4, b"last")]


def test_an_input_that_is_not_there_or_no_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="There is no file"):
        examine(tmp_path / "none.jsonl")
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(OfflineError, match="is not a table that can be read"):
        examine(tmp_path / "x.parquet")
