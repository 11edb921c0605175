"""Freed memory is returned to the operating system, after every start of an engine."""

import ctypes
import logging
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from server.generation import free_memory
from server.generation.engine_arguments import OWNER_PID_VARIABLE, EngineOptions
from server.generation.free_memory import release_free_memory
from tests.support.paths import ROOT

HEAP_MIB = 100
RESIDENT_AFTER_FREEING = f"""
import sys, threading
import psutil
from server.generation.free_memory import release_free_memory

resident_mib = lambda: psutil.Process().memory_info().rss / 2**20
last_block = []

def allocate():
    blocks = [bytearray(b"x" * 8192) for _ in range({HEAP_MIB} * 2**20 // 8192)]
    last_block.append(blocks[-1])

before = resident_mib()
thread = threading.Thread(target=allocate)
thread.start()
thread.join()
if sys.argv[1] == "release":
    release_free_memory()
print(resident_mib() - before)
"""
"""Prints the MiB that remain resident after a thread has allocated and freed a heap.

The blocks are too small to be mapped separately, so glibc keeps them. The last one stays allocated at the top of the
thread's heap, so that glibc cannot shrink the heap on its own.
"""


def resident_mib_after_freeing(mode: str) -> float:
    """Runs the program in a process of its own, whose memory nothing else changes."""
    command = [sys.executable, "-c", RESIDENT_AFTER_FREEING, mode]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return float(process.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_memory_that_a_thread_has_freed_stays_resident_until_it_is_released() -> None:
    assert resident_mib_after_freeing("keep") > 0.9 * HEAP_MIB, "glibc returns the memory on its own"
    assert resident_mib_after_freeing("release") < 0.1 * HEAP_MIB


def test_a_c_library_without_malloc_trim_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    release_free_memory()


@pytest.mark.engine  # it starts no engine, but it imports vllm, which takes seconds in a process without engine tests
async def test_an_engine_start_releases_free_memory_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine and its first requests are replaced; the order of the calls is that of `create`."""
    from server.generation import vllm_engine

    calls: list[str] = []

    def replacement(name: str) -> Any:
        async def call(*_: Any) -> None:
            calls.append(name)

        return call

    def start_engine(*_: Any, **__: Any) -> Any:
        calls.append("engine")
        return SimpleNamespace(
            model_config=SimpleNamespace(model="policy", max_model_len=8), shutdown=lambda: calls.append("shutdown")
        )

    # `create` writes its process id to the environment and sets the level of vLLM's logger; both stay as they are.
    monkeypatch.setenv(OWNER_PID_VARIABLE, "")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", logging.getLevelName(logging.getLogger("vllm").level))
    monkeypatch.setattr(vllm_engine, "default_environment", lambda device: {})
    monkeypatch.setattr("server.generation.vllm_engine.AsyncLLM.from_engine_args", start_engine)
    monkeypatch.setattr(vllm_engine, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: None))
    monkeypatch.setattr(vllm_engine.VllmGenerator, "_resume", replacement("resume"))
    monkeypatch.setattr(vllm_engine.VllmGenerator, "_warm_up", replacement("warm up"))
    c_library = SimpleNamespace(malloc_trim=lambda pad: calls.append(f"malloc_trim({pad})"))
    monkeypatch.setattr(free_memory, "ctypes", SimpleNamespace(CDLL=lambda _: c_library))

    options = EngineOptions(model="policy", device="cpu", dtype="float32")
    generator = await vllm_engine.VllmGenerator.create(options, name="policy")
    assert calls == ["engine", "resume", "warm up", "malloc_trim(0)"]
    await generator.close()
