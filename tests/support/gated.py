"""A scripted generator and scorer for replicas on Ray that wait at a gate, which a test opens when it likes."""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Scorer, Scores
from server.config import Settings
from server.generation.base import SamplingParams
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer


class Gate:
    """Places at which replicas wait while they are closed; all are open at first. An actor."""

    NAME = "gate"

    def __init__(self) -> None:
        self._news = asyncio.Condition()
        self._closed = set[str]()
        self._waiting = defaultdict[str, list[int]](list)

    @classmethod
    def start(cls) -> Any:
        """The actor, found by its name."""
        options = {"name": cls.NAME, "namespace": cls.NAME, "num_cpus": 0, "lifetime": "detached"}
        return ray.remote(cls).options(**options).remote()

    async def set_closed(self, place: str, closed: bool) -> None:
        async with self._news:
            (self._closed.add if closed else self._closed.discard)(place)
            self._waiting.pop(place, None)
            self._news.notify_all()

    async def through(self, place: str, pid: int) -> None:
        async with self._news:
            self._waiting[place].append(pid)
            self._news.notify_all()
            await self._news.wait_for(lambda: place not in self._closed)

    async def waiting(self, place: str, count: int) -> list[int]:
        """The processes of those who wait there, once they are so many."""
        async with self._news:
            await self._news.wait_for(lambda: len(self._waiting[place]) >= count)
            return self._waiting[place]


async def through(place: str) -> None:
    await ray.get_actor(Gate.NAME, Gate.NAME).through.remote(place, os.getpid())


class GatedGeneration(ScriptedGeneration):
    async def _write(self, index: int) -> None:
        await through("generator")
        await super()._write(index)


class GatedGenerator(ScriptedGenerator):
    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> GatedGeneration:
        return GatedGeneration(self, sampling, n, stream_partial)


class GatedScorer(ScriptedScorer):
    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        await through("scorer")
        return await super().score(prompt, candidates)


@asynccontextmanager
async def started_generator(_: Settings) -> AsyncIterator[GatedGenerator]:
    """Its engine dies as soon as the way to its death is open."""
    await through("start")
    generator = GatedGenerator(["dull", "great fun"])

    async def live() -> None:
        await through("death")
        generator.die()

    living = asyncio.create_task(live())
    yield generator
    living.cancel()


@asynccontextmanager
async def started_scorers(*_: Any) -> AsyncIterator[Mapping[str, Scorer]]:
    await through("start")
    yield {"length": GatedScorer()}
