"""Which checkpoint an interrupted run resumes from.

transformers' Trainer writes OUT/checkpoints/checkpoint-STEP: weights, optimiser, schedule and random state, and
trainer_state.json last. A checkpoint whose trainer_state.json is missing or incomplete was being written when the run
died, and is ignored. `run.json` beside the checkpoints identifies their run: a run with other settings or other data
cannot continue from them. All checkpoints are removed when the run ends normally.
"""

import json
import shutil
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"


class CheckpointError(ValueError):
    """The directory holds checkpoints that this run cannot use. The message gives the remedy."""


def start(directory: Path, run: dict[str, Any], *, resume: bool) -> Path | None:
    """The checkpoint to resume from; None if the run starts from the beginning, in an emptied directory.

    `run` identifies the run: everything that decides its result, as JSON.

    Raises:
        CheckpointError: there are checkpoints, and `resume` is false or they belong to another run.
    """
    newest = _newest(directory)
    if newest is None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write_run(directory, run)
        return None
    if not resume:
        raise CheckpointError(
            f"{directory} holds checkpoints of an unfinished run: continue from the last one with --resume, "
            "or choose another --out"
        )
    require_same_run(directory, run)
    return newest


def require_same_run(directory: Path, run: dict[str, Any]) -> None:
    """Compares `run` with the run.json in `directory`.

    Raises:
        CheckpointError: they differ.
    """
    begun = json.loads((directory / RUN_FILE).read_text())
    if changed := sorted(name for name in run.keys() | begun.keys() if run.get(name) != begun.get(name)):
        raise CheckpointError(
            f"{directory} belongs to a run with another {', '.join(changed)}: "
            "resume it with the values it was started with, or choose another --out"
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
