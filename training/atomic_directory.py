"""A directory of weights appears whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reranker.fsio import atomic_directory


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """Gives a directory to write to, which takes the place of `directory` when all is written."""
    with atomic_directory(directory) as unfinished:
        yield unfinished
        (unfinished / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
