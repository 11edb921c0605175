"""A directory of weights appears whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """Gives a directory to write to, which takes the place of `directory` when all is written."""
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    (unfinished / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)
