"""Runs the whole server, with the real engine and reward model, in a thread of this process, for tests to inspect."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import cast

import httpx
import uvicorn

from server import factory
from server.app import create_app
from server.config import Settings
from server.generation.base import Generator
from server.generation.supervisor import SupervisedGenerator
from server.generation.vllm_engine import VllmGenerator
from server.http.limits import bounded_protocol
from server.launch import address_of, listen
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN
from tests.support.waiting import eventually

START_TIMEOUT_S = 240


@dataclass
class Served:
    """A running server: its address, and its internals."""

    url: str
    settings: Settings
    pipelines: list[BestOfN] = field(default_factory=list)
    loops: list[asyncio.AbstractEventLoop] = field(default_factory=list)

    @property
    def generator(self) -> VllmGenerator:
        return engine_behind(self.pipelines[0].generator)

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.url, name, **labels)


def engine_behind(generator: Generator) -> VllmGenerator:
    """The running engine of a server's generator."""
    return cast(VllmGenerator, cast(SupervisedGenerator, generator).engine)


def metric(url: str, name: str, **labels: str) -> float:
    """The value of one series of /metrics; 0 if the series does not exist yet."""
    pairs = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    series = f"{name}{{{pairs}}}" if pairs else name
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        if line.startswith(f"{series} "):
            return float(line.split()[-1])
    return 0.0


def candidates_in_flight(url: str) -> float:
    """The sum over all routers on Ray."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("nbest_candidates_in_flight{"))


@contextmanager
def serve(settings: Settings) -> Iterator[Served]:
    """Serves in another thread until the block is left."""
    metrics, failures = Metrics(), list[BaseException]()
    listener = listen(settings.host, 0)
    served = Served(f"http://{address_of(listener)}", settings)

    def start() -> AbstractAsyncContextManager[BestOfN]:
        started = factory.start(settings, metrics.observe_batch, metrics.observe_restart, metrics.observe_lookup)
        return _recorded(started, served)

    app = create_app(start, settings, metrics, on_start_failure=failures.append)
    server = uvicorn.Server(uvicorn.Config(app, http=bounded_protocol(settings), log_level="warning", lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        ready = eventually(lambda: failures or is_ready(served.url), START_TIMEOUT_S)
        assert not failures, failures
        assert ready, "the server did not become ready"
        yield served
    finally:
        server.should_exit = True
        thread.join(60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


@asynccontextmanager
async def _recorded(started: AbstractAsyncContextManager[BestOfN], served: Served) -> AsyncIterator[BestOfN]:
    """Adds the pipeline and its event loop to `served`."""
    async with started as pipeline:
        served.pipelines.append(pipeline)
        served.loops.append(asyncio.get_running_loop())
        yield pipeline
