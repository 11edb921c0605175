"""Atomic files and directories, and hashes that never change."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from reranker.fsio import atomic_directory, atomic_write, sha256_of, share_of, text_hash


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with atomic_write(path) as file:
        file.write(b"{}\n")
        assert not path.exists()
    assert path.read_bytes() == b"{}\n"
    assert names_in(tmp_path) == ["summary.json"]


def test_an_existing_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(b"before")
    with atomic_write(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(b"before")
    with suppress(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert names_in(tmp_path) == ["summary.json"]


def test_the_bytes_are_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def recorded(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object) -> object:
            calls.append((name, (tmp_path / "data.incoming").stat().st_size))
            return call(*arguments)

        return wrapper

    monkeypatch.setattr(os, "fsync", recorded("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", recorded("replace", Path.replace))
    with atomic_write(tmp_path / "data") as file:
        file.write(b"12345")
    assert calls == [("fsync", 5), ("replace", 5)]


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data.incoming").write_bytes(b"a longer text of a process that was killed")
    with atomic_write(tmp_path / "data") as file:
        file.write(b"new")
    assert (tmp_path / "data").read_bytes() == b"new"
    assert names_in(tmp_path) == ["data"]


@pytest.mark.parametrize("path", ["missing/data", "file/data"])
def test_a_path_that_cannot_be_written_raises_an_os_error_with_its_cause(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"No such file or directory|Not a directory") as error,
        atomic_write(tmp_path / path),
    ):
        pytest.fail("the block was entered")
    assert error.value.strerror


def test_a_directory_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "old").touch()
    (tmp_path / "model.unfinished").mkdir()
    (tmp_path / "model.unfinished" / "leftover").touch()
    with atomic_directory(directory) as unfinished:
        unfinished.mkdir()
        (unfinished / "new").touch()
        assert names_in(directory) == ["old"]
    assert names_in(directory) == ["new"]
    assert names_in(tmp_path) == ["model"]


def test_a_block_that_raises_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "old").touch()
    with suppress(KeyboardInterrupt), atomic_directory(directory) as unfinished:
        unfinished.mkdir()
        raise KeyboardInterrupt
    assert names_in(directory) == ["old"]


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 5000)
    assert sha256_of(path) == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()


@pytest.mark.parametrize(
    ("text", "number", "share"),
    [
        ("What is 2 + 2?", 4095015417293579983, 0.22199123058956668),
        ("", 16406829232824261652, 0.8894159948913374),
        ("naïve 💥", 14517427865608618541, 0.7869913415397232),
    ],
)
def test_a_text_has_the_same_hash_and_share_for_ever(text: str, number: int, share: float) -> None:
    assert text_hash(text) == number
    assert share_of(text) == share


def test_shares_are_spread_evenly() -> None:
    shares = [share_of(f"prompt {number}") for number in range(2000)]
    assert all(0 <= share < 1 for share in shares)
    # Binomial: 200 of 2000 expected below 0.1, standard deviation 13; 60 away has probability below 1e-5.
    assert 140 < sum(share < 0.1 for share in shares) < 260
