"""A scripted generator and scorer for Ray replicas that pause at named points until a test lets them continue.

The points: "start" of a replica, "death" of an engine, "generator" and "scorer" before their work.
"""

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


class PausePoints:
    """An actor with points at which replicas wait while the point is blocked; at first no point is blocked."""

    NAME = "pause-points"

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._blocked = set[str]()
        self._waiting = defaultdict[str, list[int]](list)

    @classmethod
    def start(cls) -> Any:
        """Starts the actor, which replicas look up by its name."""
        options = {"name": cls.NAME, "namespace": cls.NAME, "num_cpus": 0, "lifetime": "detached"}
        return ray.remote(cls).options(**options).remote()

    async def set_blocked(self, point: str, blocked: bool) -> None:
        async with self._changed:
            (self._blocked.add if blocked else self._blocked.discard)(point)
            self._waiting.pop(point, None)
            self._changed.notify_all()

    async def wait(self, point: str, pid: int) -> None:
        """Returns when the point is not blocked; `pid` is the process that waits."""
        async with self._changed:
            self._waiting[point].append(pid)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: point not in self._blocked)

    async def waiting_pids(self, point: str, count: int) -> list[int]:
        """The process of each call that waits at the point, once `count` calls do."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._waiting[point]) >= count)
            return self._waiting[point]


async def pause(point: str) -> None:
    """Waits in a replica while the point is blocked."""
    await ray.get_actor(PausePoints.NAME, PausePoints.NAME).wait.remote(point, os.getpid())


class PausableGeneration(ScriptedGeneration):
    async def _write(self, index: int) -> None:
        await pause("generator")
        await super()._write(index)


class PausableGenerator(ScriptedGenerator):
    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> PausableGeneration:
        return PausableGeneration(self, sampling, n, stream_partial)


class PausableScorer(ScriptedScorer):
    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        await pause("scorer")
        return await super().score(prompt, candidates)


@asynccontextmanager
async def started_generator(_: Settings) -> AsyncIterator[PausableGenerator]:
    """A generator whose engine dies as soon as "death" is not blocked."""
    await pause("start")
    generator = PausableGenerator(["dull", "great fun"])

    async def die_when_allowed() -> None:
        await pause("death")
        generator.die()

    task = asyncio.create_task(die_when_allowed())
    yield generator
    task.cancel()


@asynccontextmanager
async def started_scorers(*_: Any) -> AsyncIterator[Mapping[str, Scorer]]:
    await pause("start")
    yield {"length": PausableScorer()}
