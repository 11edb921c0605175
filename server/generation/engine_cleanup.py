"""The processes of an engine, and what they leave behind when they are killed.

An engine closes its processes by itself, and its own workers end when its core does. This is for when that goes wrong:
a worker that hangs would keep the memory of its device, and a core that was killed leaves its shared memory until this
process ends, one segment with every restart. When it is this process that is killed,
`server.generation.worker_watchdog` ends the engine.

Memory that was freed goes back to the system.

glibc keeps what is freed for the thread that had it. An engine's start needs a hundred MiB for a moment, in threads
that are others with the next start: without this a server grows with every engine that dies.
"""

import asyncio
import contextlib
import ctypes
import multiprocessing
from collections.abc import Awaitable
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import PurePath
from typing import Self

import psutil


def give_back_free_memory() -> None:
    """Takes milliseconds; does nothing where the C library is not glibc, which alone has the function."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


SHARED_MEMORY = PurePath("/dev/shm")  # noqa: S108  # where Linux shows the segments
END_TIMEOUT_S = 5.0
"""A worker whose core is gone notices within a second."""
OWNER_VARIABLE = "ENGINE_OWNER_PID"
"""In the environment of an engine's processes: the id of the process that they must not outlive."""
ENDS_WITH_ITS_OWNER = "server.generation.worker_watchdog.EndsWithItsOwner"
"""What vLLM mixes into its workers for that."""


def started() -> set[BaseProcess]:
    """The processes that multiprocessing has started here and that still run."""
    return set(multiprocessing.active_children())


async def give_up(starting: Awaitable[object], before: set[BaseProcess]) -> None:
    """Kills what has been started since `before` until the start, which runs in a thread, has failed of it."""
    waiting = asyncio.ensure_future(starting)
    while not waiting.done():
        for process in started() - before:
            process.kill()
        await asyncio.wait([waiting], timeout=0.1)
    with contextlib.suppress(BaseException):  # that it has failed is known
        waiting.result()


class EngineProcesses:
    """The process tree of one engine, and the shared memory it uses."""

    def __init__(self, processes: list[psutil.Process], segments: set[str]) -> None:
        self._processes = processes
        self._segments = segments

    @classmethod
    def since(cls, before: set[BaseProcess]) -> Self:
        """Of the engine that has been started since `before` was taken."""
        processes: list[psutil.Process] = []
        segments: set[str] = set()
        for core in started() - before:
            with contextlib.suppress(psutil.Error):  # it has died already
                process = psutil.Process(core.pid)
                processes += [process, *process.children(recursive=True)]
                paths = (PurePath(mapped.path) for mapped in process.memory_maps())
                segments |= {path.name for path in paths if path.parent == SHARED_MEMORY and "psm_" in path.name}
        return cls(processes, segments)

    def end(self) -> None:
        """Waits for the processes of an engine that was closed or has died, kills those that stay, frees the memory."""
        _, left = psutil.wait_procs(self._processes, END_TIMEOUT_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for name in self._segments:
            with contextlib.suppress(FileNotFoundError):  # freed, as it should be
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()
