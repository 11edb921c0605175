"""Memory that a thread has freed is returned to the operating system."""

import ctypes
import threading

import numpy
import psutil
import pytest

from server.generation.free_memory import release_free_memory

MIB = 2**20


def test_memory_that_a_thread_has_freed_is_returned_to_the_system() -> None:
    """The blocks are too small to be mapped separately, so glibc keeps them; the last pins the top of their heap."""
    last_block: list[numpy.ndarray] = []

    def work() -> None:
        blocks = [numpy.ones(8 * 1024, dtype=numpy.uint8) for _ in range(100 * MIB // (8 * 1024))]
        last_block.append(blocks[-1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    process = psutil.Process()
    before = process.memory_info().rss
    release_free_memory()
    assert before - process.memory_info().rss > 50 * MIB


def test_a_c_library_without_malloc_trim_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    release_free_memory()
