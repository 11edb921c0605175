import ctypes
import threading

import numpy
import psutil
import pytest

from server.generation.engine_cleanup import give_back_free_memory

MIB = 2**20


def test_what_a_thread_has_freed_goes_back_to_the_system() -> None:
    """Pieces too small to be mapped on their own, so that glibc keeps them; the last one pins the top of their heap."""
    last: list[numpy.ndarray] = []

    def work() -> None:
        pieces = [numpy.ones(8 * 1024, dtype=numpy.uint8) for _ in range(100 * MIB // (8 * 1024))]
        last.append(pieces[-1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    process = psutil.Process()
    before = process.memory_info().rss
    give_back_free_memory()
    assert before - process.memory_info().rss > 50 * MIB


def test_another_c_library_is_none_of_its_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    give_back_free_memory()
