"""An engine's worker ends with the process that started the engine; other processes stand for both."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import time

import pytest

from server.generation.engine_arguments import OWNER_PID_VARIABLE, WATCHED_WORKER_EXTENSION

pytestmark = pytest.mark.engine

SPAWN = multiprocessing.get_context("spawn")


def work(owner_pid: int, is_working: "multiprocessing.synchronize.Event") -> None:
    """Imports the extension, as a worker does, and then runs for ever."""
    os.environ[OWNER_PID_VARIABLE] = str(owner_pid)
    module, _, extension = WATCHED_WORKER_EXTENSION.rpartition(".")
    assert hasattr(importlib.import_module(module), extension)
    is_working.set()
    time.sleep(3600)


def test_a_worker_is_killed_when_its_owner_ends() -> None:
    owner = subprocess.Popen(["sleep", "3600"])
    is_working = SPAWN.Event()
    worker = SPAWN.Process(target=work, args=(owner.pid, is_working))
    worker.start()
    assert is_working.wait(60)
    assert worker.is_alive()
    owner.kill()
    owner.wait()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


def test_a_worker_whose_owner_has_already_ended_is_killed_at_once() -> None:
    owner = subprocess.Popen(["true"])
    owner.wait()
    is_working = SPAWN.Event()
    worker = SPAWN.Process(target=work, args=(owner.pid, is_working))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
