"""Runs that are made of `nbest` commands, one after the other, over one directory.

Each command is a process of its own, so that engine and trainer never hold memory at once. A command writes its result
whole or not at all and goes on by itself where it was interrupted; so such a run only asks which results are there. The
lock on its directory is handed to the commands too: while one of a killed run still works, the next run is refused.
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
    TrainingError: it failed.
"""


@contextmanager
def commands_in(out: Path) -> Iterator[Command]:
    """Keeps the directory for this run, and gives what runs its commands.

    Raises:
        TrainingError: another run works there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"a run works in {out}; wait for its end, or choose another --out") from error
        # The descriptor holds the lock for every process that has it.
        yield lambda arguments: _nbest(arguments, file.fileno())


def _nbest(arguments: Sequence[str], lock: int) -> None:
    """Runs the command to its end; a signal to this process is the command's, which stops so that it can go on."""
    program = str(Path(sys.executable).with_name("nbest"))
    received: list[int] = []
    with subprocess.Popen([program, *arguments], pass_fds=(lock,)) as process:  # noqa: S603 (our own command)

        def hand_on(number: int, _: Any) -> None:
            received.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        raise TrainingError(f"stopped by signal {received[0]}; the same command goes on")
    if code:
        raise TrainingError(
            f"nbest {' '.join(arguments)} ended with {code}; what is done is kept, the same command goes on"
        )
