"""Ends an engine's workers when the process that started the engine ends.

A process that is killed by SIGKILL cannot end its children, and an engine that waits for requests does not notice the
kill: its processes would hold their memory forever. So vLLM mixes `WatchedWorkerExtension` into its workers, which
import this module; no other process does. On import a thread starts that waits for the end of the owner, the process
whose id is in the environment, and then kills the worker. The engine's core process ends with its workers.
"""

import contextlib
import os
import select
import signal
import threading

from server.generation.engine_arguments import OWNER_PID_VARIABLE
from server.generation.vllm_engine import WorkerExtension


class WatchedWorkerExtension(WorkerExtension):
    """The worker extension of an engine whose workers must not outlive their owner; importing its module suffices."""


def _die_with(pid: int) -> None:
    """Kills this process when the process `pid` of this machine has ended; never returns."""
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(pid)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


if owner_pid := os.environ.get(OWNER_PID_VARIABLE):
    threading.Thread(target=_die_with, args=(int(owner_pid),), daemon=True, name="worker-watchdog").start()
