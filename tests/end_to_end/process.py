"""`nbest serve` as a process of its own, as users run it, and a look at what it is made of from outside."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from server.launch import address_of, listen
from tests.end_to_end.served import START_TIMEOUT_S, is_ready, metric
from tests.support.waiting import eventually

NBEST = Path(sys.executable).with_name("nbest")
EXIT_TIMEOUT_S = 60
ENGINE_CORE = "VLLM::EngineCore"
"""What vLLM calls the process that runs an engine."""


@dataclass
class ServeProcess:
    """A running `nbest serve`. What it says goes to a file, so that it never waits for a reader."""

    url: str
    process: psutil.Popen
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.url, name, **labels)

    def is_ready(self) -> bool:
        return is_ready(self.url)

    def is_healthy(self) -> bool:
        return httpx.get(f"{self.url}/health", timeout=30).status_code == 200

    def children(self) -> list[psutil.Process]:
        return list(self.process.children(recursive=True))

    def named(self, name: str) -> psutil.Process | None:
        """The child process of that name, if there is one."""
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() == name:
                    return child
        return None

    def engine(self) -> psutil.Process:
        """Its core, waited for: an engine that has just been replaced takes its name before it is ready."""
        assert eventually(lambda: self.named(ENGINE_CORE) is not None), f"{self.children()}\n{self.said()}"
        core = self.named(ENGINE_CORE)
        assert core is not None
        return core

    def shared_memory(self) -> set[str]:
        """The segments that its engine maps."""
        return {mapped.path for mapped in self.engine().memory_maps() if mapped.path.startswith("/dev/shm/psm_")}

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, list[psutil.Process]]:
        """The exit code, and the children that have not ended."""
        children = self.children()
        self.process.send_signal(number)
        code = self.process.wait(EXIT_TIMEOUT_S)
        _, left = psutil.wait_procs(children, timeout=10)  # multiprocessing's resource tracker ends by itself with it
        return code, [one for one in left if lives(one)]


def lives(process: psutil.Process) -> bool:
    """Whether it does anything any more: one that has ended can wait for a parent who asks how."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def nbest_serve(*flags: str, **environment: str) -> Iterator[ServeProcess]:
    """`nbest serve` on a free port, ready; killed on leaving, unless it has been stopped by then."""
    with listen("127.0.0.1", 0) as probe:
        address = address_of(probe)
    with tempfile.NamedTemporaryFile("w", prefix="nbest-serve-", suffix=".log") as log:
        command = [str(NBEST), "serve", "--port", address.split(":")[1], *flags]
        process = psutil.Popen(command, stderr=log, env=os.environ | environment)
        served = ServeProcess(f"http://{address}", process, Path(log.name))
        try:
            assert eventually(lambda: served.is_ready() or process.poll() is not None, START_TIMEOUT_S)
            assert process.poll() is None, served.said()
            yield served
        finally:
            if process.poll() is None:
                for one in [*served.children(), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            process.wait()
