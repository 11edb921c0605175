"""One scripted server in both modes, in one process and on Ray, for the promises that both keep.

A request's first message (or its text) is the name of a script, so that one deployment plays them all. What happens in
a replica is told to a `Witness`, which the test asks.
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
from reranker.scorers.base import Scorer, Scores
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

PATIENCE_S = 60
"""For what takes milliseconds, on a machine that has much else to do."""
TASTE = {"dull": -2.0, "a fine film": 1.0, "great fun": 2.5}


class Dies(ScriptedGenerator):
    """Its process ends as soon as it has begun to generate."""

    def __init__(self) -> None:
        super().__init__(["never"], delays_s={0: 600})

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        asyncio.get_running_loop().call_later(0.2, os._exit, 1)
        return super().generate(prompt, sampling, n, stream_partial=stream_partial)


class DyingScorer(ScriptedScorer):
    async def score(self, *_: Any) -> Scores:
        os._exit(1)


SCRIPTS: dict[str, Callable[[], ScriptedGenerator]] = {
    "films": lambda: ScriptedGenerator(["dull", "a fine film", "great fun"]),
    "one fails": lambda: ScriptedGenerator(["dull", None, "great fun"]),
    "grows": lambda: ScriptedGenerator(["first " + "word " * 200], word_delay_s=60),
    "slow": lambda: ScriptedGenerator(["dull", "a fine film", "great fun"], delays_s={1: 600, 2: 600}),
    "endless": lambda: ScriptedGenerator(["dull"], delays_s={0: 600, 1: 600, 2: 600}),
    "slow to start": lambda: ScriptedGenerator(["dull"], delays_s={0: 600}),
    "refused": lambda: ScriptedGenerator([], refusal=BadRequestError("No.", param="messages")),
    "too long": lambda: ScriptedGenerator([], refusal=ContextLengthError("Too long.", param="messages")),
    "overloaded": lambda: ScriptedGenerator([], refusal=OverloadedError("Full.", retry_after_s=7)),
    "chatters": lambda: ScriptedGenerator([" ".join(map(str, range(500)))]),
    "dies": Dies,
    "down": lambda: ScriptedGenerator([], refusal=NotReadyError("Gone.")),
}


class Witness(Protocol):
    """Hears in the replica what happens to candidates, and tells the test."""

    def tell(self, event: str, script: str, index: int) -> None: ...

    def hear(self, event: str, script: str, count: int) -> list[int]:
        """The candidates of this script to which it has happened since the last question, once they are `count`."""


class ThreadWitness:
    def __init__(self) -> None:
        self._news = threading.Condition()
        self._told = defaultdict[tuple[str, str], list[int]](list)

    def tell(self, event: str, script: str, index: int) -> None:
        with self._news:
            self._told[event, script].append(index)
            self._news.notify_all()

    def hear(self, event: str, script: str, count: int) -> list[int]:
        with self._news:
            assert self._news.wait_for(lambda: len(self._told[event, script]) >= count, PATIENCE_S)
            return sorted(self._told.pop((event, script)))


class ActorWitness:
    """A `ThreadWitness` in an actor, found by its name."""

    NAME = "witness"

    @classmethod
    def start(cls) -> "ActorWitness":
        held = ray.remote(ThreadWitness).options(
            name=cls.NAME, namespace=cls.NAME, num_cpus=0, max_concurrency=4, lifetime="detached"
        )
        ray.get(held.remote().__ray_ready__.remote())
        return cls()

    def tell(self, event: str, script: str, index: int) -> None:
        ray.get_actor(self.NAME, self.NAME).tell.remote(event, script, index)

    def hear(self, event: str, script: str, count: int) -> list[int]:
        told: list[int] = ray.get(ray.get_actor(self.NAME, self.NAME).hear.remote(event, script, count))
        return told


class _Told(list[int]):
    def __init__(self, witness: Witness, script: str) -> None:
        super().__init__()
        self._witness = witness
        self._script = script

    def append(self, index: int) -> None:
        self._witness.tell("cancelled", self._script, index)


class Scripts:
    """A generator that plays the script its prompt names."""

    model = "scripted"

    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    def generate(self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False) -> Generation:
        script = prompt.text or prompt.messages[0].content
        generator = SCRIPTS[script]()
        generator.cancelled = _Told(self._witness, script)
        self._witness.tell("started", script, n)
        return generator.generate(prompt, sampling, n, stream_partial=stream_partial)

    async def load_adapter(self, path: str) -> str:
        if path.endswith("unfit"):
            raise BadRequestError("It does not fit.")
        self._witness.tell("loaded", path, 0)
        return version_at("load_adapter", Path(path))

    async def reload_weights(self, path: str) -> str:
        raise BadRequestError("There are none.")

    async def check_ready(self) -> None:
        """Always ready."""

    async def close(self) -> None:
        """Nothing is held."""


def scorers() -> dict[str, Scorer]:
    made = {"taste": ScriptedScorer(TASTE), "broken": ScriptedScorer(fails=True), "dying": DyingScorer()}
    for name, scorer in made.items():
        scorer.name = name
    return dict(made)


@dataclass
class Server:
    """A server under test, whichever its mode."""

    url: str
    witness: Witness

    def post(self, path: str, script: str, **fields: Any) -> httpx.Response:
        body = {"model": "scripted", "messages": [{"role": "user", "content": script}], "best_of": 3} | fields
        return httpx.post(self.url + path, json=body, timeout=PATIENCE_S)

    def chat(self, script: str, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", script, **fields)


@contextmanager
def in_process() -> Iterator[Server]:
    witness = ThreadWitness()

    @asynccontextmanager
    async def start() -> AsyncIterator[BestOfN]:
        yield BestOfN(Scripts(witness), scorers())

    app = create_app(start, Settings(), Metrics())
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, http="httptools", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    yield Server(f"http://{address_of(listener)}", witness)
    server.should_exit = True
    thread.join(PATIENCE_S)


@contextmanager
def on_ray() -> Iterator[Server]:
    """Two of each, so that nothing holds only because there is one of each."""
    settings = Settings(ray=True, generator_replicas="2", scorer_replicas="2", router_replicas="2")
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with joined_cluster(settings):
        witness = ActorWitness.start()
        application = deployments.application(settings, _start_scripts, _start_scorers)
        with deployments.deployed(application, settings, port):
            yield Server(f"http://127.0.0.1:{port}", witness)


MODES = {"in one process": in_process, "on Ray": on_ray}


@asynccontextmanager
async def _start_scripts(_: Settings) -> AsyncIterator[Scripts]:
    yield Scripts(ActorWitness())


@asynccontextmanager
async def _start_scorers(*_: Any) -> AsyncIterator[Mapping[str, Scorer]]:
    yield scorers()


def generator_handle() -> Any:
    """The handle of the generator deployment, as a router has it."""
    return serve.get_deployment_handle(deployments.GENERATOR, deployments.APP_NAME)
