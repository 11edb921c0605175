"""What a dead engine leaves behind is found and cleared away; here other processes stand for the engine's."""

import asyncio
import importlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from server.generation import engine_cleanup
from server.generation.engine_cleanup import ENDS_WITH_ITS_OWNER, OWNER_VARIABLE, EngineProcesses, give_up, started

SPAWN = multiprocessing.get_context("spawn")


def hold(segment: str, holding: "multiprocessing.synchronize.Event") -> None:
    """Maps the shared memory, and then hangs."""
    memory = SharedMemory(segment)
    holding.set()
    time.sleep(3600)
    memory.close()


@pytest.fixture
def segment() -> Iterator[SharedMemory]:
    """Shared memory that nobody frees but the one who clears away."""
    memory = SharedMemory(create=True, size=64)
    yield memory
    memory.close()


@pytest.fixture
def engine(segment: SharedMemory) -> Iterator[tuple[BaseProcess, EngineProcesses]]:
    before = started()
    holding = SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(segment.name, holding))
    process.start()
    assert holding.wait(60)
    yield process, EngineProcesses.since(before)
    process.kill()
    process.join()


def test_a_killed_process_leaves_no_shared_memory(
    engine: tuple[BaseProcess, EngineProcesses], segment: SharedMemory
) -> None:
    process, processes = engine
    process.kill()
    assert Path("/dev/shm", segment.name).exists()
    processes.end()
    assert not Path("/dev/shm", segment.name).exists()


def test_a_process_that_stays_is_killed(
    engine: tuple[BaseProcess, EngineProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cleanup, "END_TIMEOUT_S", 0.1)
    process, processes = engine
    processes.end()
    process.join(60)
    assert not process.is_alive()


def test_what_has_been_cleared_away_by_the_engine_itself_is_no_trouble(
    engine: tuple[BaseProcess, EngineProcesses], segment: SharedMemory
) -> None:
    process, processes = engine
    process.kill()
    segment.unlink()
    processes.end()
    processes.end()


async def test_a_start_that_is_given_up_ends_though_its_thread_cannot_be_cancelled() -> None:
    before = started()
    process = SPAWN.Process(target=time.sleep, args=(3600,))

    def start() -> None:
        process.start()
        process.join()
        raise RuntimeError("the engine did not start")

    async with asyncio.timeout(60):
        await give_up(asyncio.create_task(asyncio.to_thread(start)), before)
    assert not process.is_alive()


def work(owner: int, at_work: "multiprocessing.synchronize.Event") -> None:
    """What a worker does: imports its extension, and then goes on for ever."""
    os.environ[OWNER_VARIABLE] = str(owner)
    module, _, extension = ENDS_WITH_ITS_OWNER.rpartition(".")
    assert hasattr(importlib.import_module(module), extension)
    at_work.set()
    time.sleep(3600)


def test_a_worker_lives_as_long_as_its_owner_and_no_longer() -> None:
    owner = subprocess.Popen(["sleep", "3600"])
    at_work = SPAWN.Event()
    worker = SPAWN.Process(target=work, args=(owner.pid, at_work))
    worker.start()
    assert at_work.wait(60)
    assert worker.is_alive()
    owner.kill()
    owner.wait()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


def test_a_worker_whose_owner_ended_before_it_began_ends_at_once() -> None:
    owner = subprocess.Popen(["true"])
    owner.wait()
    at_work = SPAWN.Event()
    worker = SPAWN.Process(target=work, args=(owner.pid, at_work))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
