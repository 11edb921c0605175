"""A directory of weights is written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reranker.fsio import atomic_directory


@contextmanager
def atomic_model_directory(directory: Path) -> Iterator[Path]:
    """As `reranker.fsio.atomic_directory`, without the empty model card (README.md) that PEFT writes."""
    with atomic_directory(directory) as unfinished:
        yield unfinished
        (unfinished / "README.md").unlink(missing_ok=True)
