"""Runs made of `nbest` commands, one after another, in one output directory.

Each command is a process of its own, so that engine and trainer never hold memory at the same time. A command writes
its result whole or not at all, and continues an interrupted run of its own; the caller only checks which results exist.
The commands inherit the lock on the directory: while a command of a killed run is still running, a new run is refused.
"""

import fcntl
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import TrainingError

Command = Callable[[Sequence[str]], None]
"""Runs `nbest` with these arguments.

Raises:
    TrainingError: the command failed.
"""


@contextmanager
def locked_commands(out: Path) -> Iterator[Command]:
    """Locks the directory for one run and yields the function that runs its commands.

    Raises:
        TrainingError: another run holds the lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"another run is using {out}; wait until it ends, or choose another --out") from error
        # Every process that has the descriptor holds the lock.
        yield lambda arguments: _nbest(arguments, file.fileno())


def _nbest(arguments: Sequence[str], lock: int) -> None:
    """Runs the command to its end. SIGINT and SIGTERM are passed to the command, which stops and can be resumed."""
    program = str(Path(sys.executable).with_name("nbest"))
    received: list[int] = []
    with subprocess.Popen([program, *arguments], pass_fds=(lock,)) as process:  # noqa: S603 (our own command)

        def forward(number: int, _: Any) -> None:
            received.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        raise TrainingError(f"stopped by signal {received[0]}; run the same command to continue")
    if code:
        raise TrainingError(
            f"nbest {' '.join(arguments)} ended with exit code {code}; finished steps are kept, and the same command "
            "continues from them"
        )
