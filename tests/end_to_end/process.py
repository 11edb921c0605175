"""Runs `nbest serve` as a process, as users do, and inspects its child processes and shared memory from outside."""

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
"""vLLM's name for the process that runs an engine."""


@dataclass
class ServeProcess:
    """A running `nbest serve`; its stderr goes to a file, so that it never blocks on a full pipe."""

    url: str
    process: psutil.Popen
    log: Path

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.url, name, **labels)

    def is_ready(self) -> bool:
        return is_ready(self.url)

    def is_healthy(self) -> bool:
        return httpx.get(f"{self.url}/health", timeout=30).status_code == 200

    def children(self) -> list[psutil.Process]:
        return list(self.process.children(recursive=True))

    def child_named(self, name: str) -> psutil.Process | None:
        """The child process with that name, or None."""
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() == name:
                    return child
        return None

    def engine(self) -> psutil.Process:
        """Waits for the engine's core process; a new engine's process gets its name before the engine is ready."""
        assert eventually(lambda: self.child_named(ENGINE_CORE) is not None), f"{self.children()}\n{self.log_text()}"
        core = self.child_named(ENGINE_CORE)
        assert core is not None
        return core

    def shared_memory(self) -> set[str]:
        """The paths of the shared memory segments that the engine maps."""
        paths = [mapping.path for mapping in self.engine().memory_maps()]
        return {path for path in paths if path.startswith("/dev/shm/psm_")}

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, list[psutil.Process]]:
        """Sends the signal and waits; the exit code, and the child processes that still run."""
        children = self.children()
        self.process.send_signal(number)
        code = self.process.wait(EXIT_TIMEOUT_S)
        _, left = psutil.wait_procs(children, timeout=10)  # multiprocessing's resource tracker ends after its parent
        return code, [child for child in left if is_running(child)]


def is_running(process: psutil.Process) -> bool:
    """Whether the process still runs; a zombie, which has ended and waits for its parent, does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def nbest_serve(*flags: str, **environment: str) -> Iterator[ServeProcess]:
    """Starts `nbest serve` on a free port and waits until it is ready; kills it at the end if it still runs."""
    with listen("127.0.0.1", 0) as probe:
        address = address_of(probe)
    with tempfile.NamedTemporaryFile("w", prefix="nbest-serve-", suffix=".log") as log:
        command = [str(NBEST), "serve", "--port", address.split(":")[1], *flags]
        process = psutil.Popen(command, stderr=log, env=os.environ | environment)
        served = ServeProcess(f"http://{address}", process, Path(log.name))
        try:
            assert eventually(lambda: served.is_ready() or process.poll() is not None, START_TIMEOUT_S)
            assert process.poll() is None, served.log_text()
            yield served
        finally:
            if process.poll() is None:
                for running in [*served.children(), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        running.kill()
            process.wait()
