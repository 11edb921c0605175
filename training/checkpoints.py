"""Where an interrupted run goes on.

transformers' Trainer writes OUT/checkpoints/checkpoint-STEP: weights, optimizer, schedule and random state, its
trainer_state.json last. A checkpoint without that file, or with half of it, was being written when the run died and is
passed over. `run.json` beside them says what run they belong to: with other settings or other data the rest of the run
would not be the rest of this run. A run that ends well removes them all.
"""

import json
import shutil
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"


class CheckpointError(ValueError):
    """The checkpoints found are not those of the run asked for. The message says the way out."""


def start(directory: Path, run: dict[str, Any], *, resume: bool) -> Path | None:
    """The checkpoint to go on from; None to start at the beginning, in an empty directory.

    `run` is everything that decides the result, as JSON.

    Raises:
        CheckpointError: there are checkpoints, and they are not to be resumed or belong to another run.
    """
    newest = _newest(directory)
    if newest is None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write_run(directory, run)
        return None
    if not resume:
        raise CheckpointError(
            f"{directory} holds checkpoints of a run that did not end: go on from the last with --resume, "
            "or choose another --out"
        )
    require_same_run(directory, run)
    return newest


def require_same_run(directory: Path, run: dict[str, Any]) -> None:
    """Compares a run with the one that `directory` was begun with.

    Raises:
        CheckpointError: they differ.
    """
    begun = json.loads((directory / RUN_FILE).read_text())
    if changed := sorted(name for name in run.keys() | begun.keys() if run.get(name) != begun.get(name)):
        raise CheckpointError(
            f"{directory} belongs to a run with another {', '.join(changed)}: "
            "resume it as it was begun, or choose another --out"
        )


def write_run(directory: Path, run: dict[str, Any]) -> None:
    (directory / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")


def _newest(directory: Path) -> Path | None:
    complete = [path for path in directory.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
