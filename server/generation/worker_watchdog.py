"""Ends an engine's workers with the server that started the engine.

A server that is killed by SIGKILL can end nobody, and an engine that waits for requests does not notice: its processes
would hold their memory for ever. So vLLM mixes `EndsWithItsOwner` into its workers, which imports this module there and
nowhere else: a thread waits for the server's end and then kills the worker. The engine's core ends with its workers.
"""

import contextlib
import os
import select
import signal
import threading

from server.generation.engine_cleanup import OWNER_VARIABLE
from server.generation.vllm_engine import WorkerExtension


class EndsWithItsOwner(WorkerExtension):
    """Adds nothing of its own to a worker; importing its module is what counts."""


def _end_with(pid: int) -> None:
    """Returns never: kills this process when that one, on the same machine, has ended."""
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(pid)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


if owner := os.environ.get(OWNER_VARIABLE):
    threading.Thread(target=_end_with, args=(int(owner),), daemon=True, name="end-with-owner").start()
