"""A scripted server in both modes, in one process and on Ray, for tests of what both modes must do.

A request's first message, or its prompt text, is the name of a script, so one deployment runs every script. The
generator records what happens to its candidates in an `EventLog`, from which the test reads.
"""

import asyncio
import os
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import ray
import uvicorn
from ray import serve

from reranker.candidate import Prompt
from reranker.scorers.base import Scorer, Scores, UnscorableError
from server.app import create_app
from server.config import Settings
from server.distributed import deployments
from server.distributed.cluster import joined_cluster
from server.errors import BadRequestError, ContextLengthError, NotReadyError, OverloadedError
from server.generation.base import Generation, SamplingParams
from server.generation.weight_store import version_at
from server.launch import address_of, listen
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer

TIMEOUT_S = 60
"""For operations of milliseconds, on a busy machine."""
REWARDS = {"dull": -2.0, "a fine film": 1.0, "great fun": 2.5}


class CrashingGenerator(ScriptedGenerator):
    """Ends its process as soon as a generation has started."""

    def __init__(self) -> None:
        super().__init__(["never"], delays_s={0: 600})

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        asyncio.get_running_loop().call_later(0.2, os._exit, 1)
        return super().generate(prompt, sampling, n, stream_partial=stream_partial)


class CrashingScorer(ScriptedScorer):
    async def score(self, *_: Any) -> Scores:
        os._exit(1)


SCRIPTS: dict[str, Callable[[], ScriptedGenerator]] = {
    "films": lambda: ScriptedGenerator(["dull", "a fine film", "great fun"]),
    "one fails": lambda: ScriptedGenerator(["dull", None, "great fun"]),
    "partial text": lambda: ScriptedGenerator(["first " + "word " * 200], word_delay_s=60),
    "slow": lambda: ScriptedGenerator(["dull", "a fine film", "great fun"], delays_s={1: 600, 2: 600}),
    "endless": lambda: ScriptedGenerator(["dull"], delays_s={0: 600, 1: 600, 2: 600}),
    "slow to start": lambda: ScriptedGenerator(["dull"], delays_s={0: 600}),
    "refused": lambda: ScriptedGenerator([], refusal=BadRequestError("No.", param="messages")),
    "too long": lambda: ScriptedGenerator([], refusal=ContextLengthError("Too long.", param="messages")),
    "overloaded": lambda: ScriptedGenerator([], refusal=OverloadedError("Full.", retry_after_s=7)),
    "many tokens": lambda: ScriptedGenerator([" ".join(map(str, range(500)))]),
    "crashes": CrashingGenerator,
    "down": lambda: ScriptedGenerator([], refusal=NotReadyError("Gone.")),
}


class EventLog(Protocol):
    """Records in a replica what happens to candidates; the test reads it."""

    def record(self, event: str, script: str, index: int) -> None: ...

    def wait_for(self, event: str, script: str, count: int) -> list[int]:
        """The indexes recorded for this event and script since the previous call, once there are `count`."""


class ThreadEventLog:
    """The event log of a server in a thread of the test's process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._indexes = defaultdict[tuple[str, str], list[int]](list)

    def record(self, event: str, script: str, index: int) -> None:
        with self._changed:
            self._indexes[event, script].append(index)
            self._changed.notify_all()

    def wait_for(self, event: str, script: str, count: int) -> list[int]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._indexes[event, script]) >= count, TIMEOUT_S)
            return sorted(self._indexes.pop((event, script)))


class ActorEventLog:
    """A `ThreadEventLog` in a Ray actor, which is looked up by its name."""

    NAME = "event-log"

    @classmethod
    def start(cls) -> "ActorEventLog":
        actor = ray.remote(ThreadEventLog).options(
            name=cls.NAME, namespace=cls.NAME, num_cpus=0, max_concurrency=4, lifetime="detached"
        )
        ray.get(actor.remote().__ray_ready__.remote())
        return cls()

    def record(self, event: str, script: str, index: int) -> None:
        ray.get_actor(self.NAME, self.NAME).record.remote(event, script, index)

    def wait_for(self, event: str, script: str, count: int) -> list[int]:
        indexes: list[int] = ray.get(ray.get_actor(self.NAME, self.NAME).wait_for.remote(event, script, count))
        return indexes


class _RecordedCancellations(list[int]):
    """The `cancelled` list of a scripted generator; what is appended goes to the event log."""

    def __init__(self, events: EventLog, script: str) -> None:
        super().__init__()
        self._events = events
        self._script = script

    def append(self, index: int) -> None:
        self._events.record("cancelled", self._script, index)


class ScriptByPromptGenerator:
    """A generator that runs the script that the prompt names."""

    model = "scripted"

    def __init__(self, events: EventLog) -> None:
        self._events = events

    def generate(self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False) -> Generation:
        script = prompt.text or prompt.messages[0].content
        generator = SCRIPTS[script]()
        generator.cancelled = _RecordedCancellations(self._events, script)
        self._events.record("started", script, n)
        return generator.generate(prompt, sampling, n, stream_partial=stream_partial)

    async def load_adapter(self, path: str) -> str:
        if path.endswith("misfit"):
            raise BadRequestError("It does not fit.")
        self._events.record("loaded", path, 0)
        return version_at("load_adapter", Path(path))

    async def reload_weights(self, path: str) -> str:
        raise BadRequestError("There are none.")

    async def check_ready(self) -> None:
        """Always ready."""

    async def close(self) -> None:
        """Nothing to free."""


def scorers() -> dict[str, Scorer]:
    by_name = {
        "taste": ScriptedScorer(REWARDS),
        "broken": ScriptedScorer(fails=True),
        "refusing": ScriptedScorer(refusal=UnscorableError("no system role")),
        "crashing": CrashingScorer(),
    }
    for name, scorer in by_name.items():
        scorer.name = name
    return dict(by_name)


@dataclass
class Server:
    """A running server in either mode."""

    url: str
    events: EventLog

    def post(self, path: str, script: str, **fields: Any) -> httpx.Response:
        body = {"model": "scripted", "messages": [{"role": "user", "content": script}], "best_of": 3} | fields
        return httpx.post(self.url + path, json=body, timeout=TIMEOUT_S)

    def chat(self, script: str, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", script, **fields)


@contextmanager
def in_process() -> Iterator[Server]:
    events = ThreadEventLog()

    @asynccontextmanager
    async def start() -> AsyncIterator[BestOfN]:
        yield BestOfN(ScriptByPromptGenerator(events), scorers())

    app = create_app(start, Settings(), Metrics())
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, http="httptools", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    yield Server(f"http://{address_of(listener)}", events)
    server.should_exit = True
    thread.join(TIMEOUT_S)


@contextmanager
def on_ray() -> Iterator[Server]:
    """Two replicas of each deployment, so that no test passes only because there is a single replica."""
    settings = Settings(ray=True, generator_replicas="2", scorer_replicas="2", router_replicas="2")
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with joined_cluster(settings):
        events = ActorEventLog.start()
        application = deployments.application(settings, _started_generator, _started_scorers)
        with deployments.deployed(application, settings, port):
            yield Server(f"http://127.0.0.1:{port}", events)


MODES = {"in one process": in_process, "on Ray": on_ray}


@asynccontextmanager
async def _started_generator(_: Settings) -> AsyncIterator[ScriptByPromptGenerator]:
    yield ScriptByPromptGenerator(ActorEventLog())


@asynccontextmanager
async def _started_scorers(*_: Any) -> AsyncIterator[Mapping[str, Scorer]]:
    yield scorers()


def generator_handle() -> Any:
    """The handle of the generator deployment, as a router uses it."""
    return serve.get_deployment_handle(deployments.GENERATOR, deployments.APP_NAME)
