"""The workers of `nbest batch --ray`: actors on a Ray cluster, each with an engine and scorers of its own.

The driver reads the input and keeps the one journal, as without Ray. A worker is built by the same assembly as a
server, answers whole lines, and knows nothing of files. A line goes to the worker that has the fewest candidates under
way. One that dies, alone or with its machine, is replaced, and what it had under way is asked of others: a line depends
on its request and its seed alone, so the results are the same.

docs/decisions/0006 tells why this is not Ray Data.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from server.config import Settings, replica_range
from server.distributed.cluster import in_thread, joined_cluster
from server.errors import NbestError, NotReadyError
from server.launch import StartError
from server.observability import logs
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult

MAX_TRIES = 5
"""A line that was under way in so many workers that died is perhaps why they did."""
MAX_FAILED_STARTS = 3
"""In a row; whatever keeps a worker from starting then is not going away."""
MAX_CALLS = 10_000
"""Lines in one worker at once: beyond what is in flight, which is for the run to bound."""

CLOSE_TIMEOUT_S = 20
"""Longest wait for a worker that frees its engine."""

StartPipeline = Callable[[Settings], AbstractAsyncContextManager[BestOfN]]

log = logging.getLogger("nbest")


class BatchWorker:
    """What runs in an actor."""

    def __init__(self, settings: Settings, start: StartPipeline) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._start = start
        self._resources = AsyncExitStack()

    async def start(self) -> None:
        """Loads the models; before anything else is asked."""
        self._pipeline = await self._resources.enter_async_context(self._start(self._settings))

    async def answer(self, request: BestOfNRequest) -> BestOfNResult | NbestError:
        """An expected error travels as a value, with its fields; what is raised is a bug."""
        try:
            return await self._pipeline.run(request)
        except NotReadyError as error:
            try:
                await self._pipeline.generator.check_ready()
            except NotReadyError:
                return WorkerNotReadyError(error.message)
            return error
        except NbestError as error:
            return error

    async def close(self) -> None:
        await self._resources.aclose()


class WorkerNotReadyError(NotReadyError):
    """The worker could not answer any line at the moment."""


@dataclass(eq=False, slots=True)
class _Place:
    """One of the workers that there are to be. `worker` is None while it starts; `failure` tells that it will not."""

    worker: Any = None
    failure: str | None = None
    candidates: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Workers:
    """Answers requests with as many workers as there are; made by `started_workers`."""

    def __init__(self, settings: Settings, start: StartPipeline, count: int) -> None:
        self._settings = settings
        self._start = start
        self._places = [_Place() for _ in range(count)]
        self._news = asyncio.Condition()
        self._keeping = [asyncio.create_task(self._keep(place)) for place in self._places]

    async def answer(self, request: BestOfNRequest) -> BestOfNResult:
        """Of whichever worker; a dead one's lines go to the next.

        Raises:
            NbestError: the request cannot be answered.
        """
        for _ in range(MAX_TRIES):
            place = await self._free_place()
            worker = place.worker
            place.candidates += request.best_of
            try:
                answer: BestOfNResult | NbestError = await worker.answer.remote(request)
            except RayTaskError:
                raise
            except RayError as error:
                log.warning("A worker has stopped, and another takes its lines: %s", error)
                self._bury(place, worker)
                continue
            finally:
                place.candidates -= request.best_of
            if isinstance(answer, WorkerNotReadyError):
                self._bury(place, worker)
                continue
            if isinstance(answer, NbestError):
                raise answer
            return answer
        raise NotReadyError(f"The {MAX_TRIES} workers that had this line have all stopped; try it again by itself.")

    async def check_ready(self) -> None:
        """Returns if there is a worker, or going to be.

        Raises:
            NotReadyError: none can be started any more.
        """
        failures = [place.failure for place in self._places if place.failure is not None]
        if len(failures) == len(self._places):
            raise NotReadyError(f"No worker could be started: {failures[0]}")

    async def ready(self) -> None:
        """Returns when the first worker is there.

        Raises:
            StartError: none can be started.
        """
        try:
            await self._free_place()
        except NotReadyError as error:
            raise StartError(error.message) from error

    async def all_ready(self) -> None:
        """Returns when every worker is there, or will never be."""
        async with self._news:
            await self._news.wait_for(lambda: all(place.worker or place.failure for place in self._places))

    async def close(self) -> None:
        for keeping in self._keeping:
            keeping.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(_stop(place.worker) for place in self._places if place.worker is not None))

    async def _free_place(self) -> _Place:
        """The worker that has the least to do, as soon as there is one."""
        async with self._news:
            await self._news.wait_for(
                lambda: any(one.worker for one in self._places) or all(one.failure for one in self._places)
            )
        await self.check_ready()
        return min((place for place in self._places if place.worker), key=lambda place: place.candidates)

    async def _keep(self, place: _Place) -> None:
        """Sees to it that there is a worker in this place."""
        failed_starts = 0
        actor = ray.remote(BatchWorker).options(
            num_cpus=self._settings.generator_cpus,
            num_gpus=self._settings.generator_gpus * self._settings.tensor_parallel_size,
            max_concurrency=MAX_CALLS,
        )
        # In its worker an engine is as in one process: what dies is started anew there.
        settings = self._settings.model_copy(update={"ray": False, "ray_address": None})
        while True:
            worker = actor.remote(settings, self._start)
            try:
                await worker.start.remote()
            except RayError as error:
                failed_starts += 1
                if failed_starts >= MAX_FAILED_STARTS or not isinstance(error, RayActorError):
                    place.failure = str(getattr(error, "cause", None) or error)
                    log.error("A worker did not start, and the others go on without it: %s", place.failure)
                    await self._tell(place, None)
                    return
                continue
            failed_starts = 0
            place.ended.clear()
            await self._tell(place, worker)
            await place.ended.wait()
            await _stop(worker)

    async def _tell(self, place: _Place, worker: Any) -> None:
        async with self._news:
            place.worker = worker
            self._news.notify_all()

    @staticmethod
    def _bury(place: _Place, worker: Any) -> None:
        """Has the place filled anew; the first of those whose line died there says so."""
        if place.worker is worker:
            place.worker = None
            place.ended.set()


async def _stop(worker: Any) -> None:
    """Ends an actor, which frees its engine if it still can."""
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await worker.close.remote()
    ray.kill(worker)


@asynccontextmanager
async def started_workers(settings: Settings, start: StartPipeline) -> AsyncIterator[Workers]:
    """Workers on the cluster of the settings, the first of which is there, until the block is left.

    Raises:
        ConfigError: there is no such cluster.
        StartError: a model could not be loaded.
    """
    async with in_thread(joined_cluster(settings)):
        workers = Workers(settings, start, replica_range(settings.generator_replicas)[1])
        try:
            await workers.ready()
            yield workers
        finally:
            await workers.close()
