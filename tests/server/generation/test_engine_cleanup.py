"""Processes and shared memory of a dead engine are removed; other processes stand for the engine's."""

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from server.generation import engine_cleanup
from server.generation.engine_cleanup import EngineProcesses, active_children, cancel_start

SPAWN = multiprocessing.get_context("spawn")


def map_and_hang(segment: str, is_mapped: "multiprocessing.synchronize.Event") -> None:
    """Maps the shared memory, and then hangs."""
    memory = SharedMemory(segment)
    is_mapped.set()
    time.sleep(3600)
    memory.close()


@pytest.fixture
def segment() -> Iterator[SharedMemory]:
    """Shared memory that the fixture does not free."""
    memory = SharedMemory(create=True, size=64)
    yield memory
    memory.close()


@pytest.fixture
def engine(segment: SharedMemory) -> Iterator[tuple[BaseProcess, EngineProcesses]]:
    children_before = active_children()
    is_mapped = SPAWN.Event()
    process = SPAWN.Process(target=map_and_hang, args=(segment.name, is_mapped))
    process.start()
    assert is_mapped.wait(60)
    yield process, EngineProcesses.since(children_before)
    process.kill()
    process.join()


def test_the_shared_memory_of_a_killed_process_is_freed(
    engine: tuple[BaseProcess, EngineProcesses], segment: SharedMemory
) -> None:
    process, processes = engine
    process.kill()
    assert Path("/dev/shm", segment.name).exists()
    processes.end()
    assert not Path("/dev/shm", segment.name).exists()


def test_a_process_that_does_not_end_is_killed(
    engine: tuple[BaseProcess, EngineProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cleanup, "END_TIMEOUT_S", 0.1)
    process, processes = engine
    processes.end()
    process.join(60)
    assert not process.is_alive()


def test_shared_memory_that_the_engine_has_freed_is_no_error(
    engine: tuple[BaseProcess, EngineProcesses], segment: SharedMemory
) -> None:
    process, processes = engine
    process.kill()
    segment.unlink()
    processes.end()
    processes.end()


async def test_a_cancelled_start_ends_although_its_thread_cannot_be_cancelled() -> None:
    children_before = active_children()
    process = SPAWN.Process(target=time.sleep, args=(3600,))

    def start() -> None:
        process.start()
        process.join()
        raise RuntimeError("the engine did not start")

    async with asyncio.timeout(60):
        await cancel_start(asyncio.create_task(asyncio.to_thread(start)), children_before)
    assert not process.is_alive()
