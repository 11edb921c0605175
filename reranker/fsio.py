"""File helpers: atomic files and directories, the SHA-256 of a file, and the stable hash that splits texts."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

HASH_BYTES = 8
"""Leading bytes of the SHA-256 that `text_hash` reads. Another number would move texts to other splits."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends: a reader sees all of the new file or the one before it.

    The bytes go to `<name>.incoming` in the same directory, which is synced to disk and then renamed over `path`. If
    the block raises, the temporary file is removed and `path` is unchanged. A killed process leaves the temporary file
    behind, and the next write of `path` overwrites it. The directory of `path` has to exist.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    incoming = path.with_name(f"{path.name}.incoming")
    try:
        with incoming.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        incoming.replace(path)
    except BaseException:
        if incoming.is_file():
            incoming.unlink()
        raise


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yields the path `<name>.unfinished` to build in; it replaces `directory` when the block ends.

    The block creates the directory, and leftovers of an earlier attempt are removed first. If the block raises,
    `directory` is unchanged and the unfinished one stays for inspection. Unlike a file, an existing directory is
    removed before the rename, so a process that is killed between the two leaves neither.
    """
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal, read in chunks.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(text: str) -> int:
    """A 64-bit hash of a text, the same on every machine: the first 8 bytes of its SHA-256, big-endian."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:HASH_BYTES], "big")


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: `text_hash` / 2^64.

    `share_of(prompt) < fraction` holds out about that fraction of the prompts, and always the same ones.
    """
    return text_hash(text) / 2**64
