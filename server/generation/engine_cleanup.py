"""Ends an engine's processes and frees its shared memory when the engine itself could not.

An engine closes its own processes, and its workers end when its core process ends. Two cases need more: a worker that
hangs would keep the memory of its device, and a core process that was killed leaves its shared memory segments until
this process ends, one more with every restart. When this process itself is killed,
`server.generation.worker_watchdog` ends the engine's workers.
"""

import asyncio
import contextlib
import multiprocessing
from collections.abc import Awaitable
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import PurePath
from typing import Self

import psutil

SHARED_MEMORY = PurePath("/dev/shm")  # noqa: S108  # where Linux shows the segments
END_TIMEOUT_S = 5.0
"""Longest wait for processes to end on their own; a worker notices the end of its core process within a second."""


def active_children() -> set[BaseProcess]:
    """The running processes that multiprocessing has started from this process."""
    return set(multiprocessing.active_children())


async def cancel_start(start: Awaitable[object], children_before: set[BaseProcess]) -> None:
    """Makes an engine's start fail, since it runs in a thread and a thread cannot be cancelled.

    Kills every child process that is not in `children_before`, again and again, until the start has failed.
    """
    future = asyncio.ensure_future(start)
    while not future.done():
        for process in active_children() - children_before:
            process.kill()
        await asyncio.wait([future], timeout=0.1)
    with contextlib.suppress(BaseException):  # the failure is expected
        future.result()


class EngineProcesses:
    """The process tree of one engine, and the shared memory segments that it maps."""

    def __init__(self, processes: list[psutil.Process], segments: set[str]) -> None:
        self._processes = processes
        self._segments = segments

    @classmethod
    def since(cls, children_before: set[BaseProcess]) -> Self:
        """The processes of the engine that was started after `children_before` was taken."""
        processes: list[psutil.Process] = []
        segments: set[str] = set()
        for core in active_children() - children_before:
            with contextlib.suppress(psutil.Error):  # it has ended already
                process = psutil.Process(core.pid)
                processes += [process, *process.children(recursive=True)]
                paths = (PurePath(mapping.path) for mapping in process.memory_maps())
                segments |= {path.name for path in paths if path.parent == SHARED_MEMORY and "psm_" in path.name}
        return cls(processes, segments)

    def end(self) -> None:
        """Waits for the processes of a closed or dead engine, kills those that remain, and frees the shared memory."""
        _, remaining = psutil.wait_procs(self._processes, END_TIMEOUT_S)
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for name in self._segments:
            with contextlib.suppress(FileNotFoundError):  # the engine has freed it
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()
