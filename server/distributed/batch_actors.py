"""The workers of `nbest batch --ray`: actors on a Ray cluster, each with its own engine and scorers.

The driver reads the input and writes the single journal, as without Ray. A worker is built from the settings like a
server, answers whole lines, and accesses no files. A line goes to the worker with the fewest running candidates. A
worker that dies, alone or with its machine, is replaced, and its running lines are sent to others. A line depends only
on its request and its seed, so the results are the same.

docs/decisions/0006 explains why this does not use Ray Data.
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
from server.distributed.cluster import entered_in_thread, joined_cluster
from server.errors import NbestError, NotReadyError
from server.launch import StartError
from server.observability import logs
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult

MAX_TRIES = 5
"""Workers that a line is sent to: a line that was running in that many workers when they died may be the cause."""
MAX_FAILED_STARTS = 3
"""Failed starts in a row after which a worker is not started again: the cause is then permanent."""
MAX_CALLS = 10_000
"""Limit of concurrent calls of one worker; more than the run ever has in flight, which the run itself limits."""

CLOSE_TIMEOUT_S = 20
"""Longest wait for a worker to free its engine."""

StartPipeline = Callable[[Settings], AbstractAsyncContextManager[BestOfN]]

log = logging.getLogger("nbest")


class BatchWorker:
    """The actor's class: one pipeline that answers requests."""

    def __init__(self, settings: Settings, start: StartPipeline) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._start = start
        self._resources = AsyncExitStack()

    async def start(self) -> None:
        """Loads the models; must be called before the other methods."""
        self._pipeline = await self._resources.enter_async_context(self._start(self._settings))

    async def answer(self, request: BestOfNRequest) -> BestOfNResult | NbestError:
        """The result; an expected error is returned as a value, with its fields, and an exception is a bug."""
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
    """The worker cannot answer any line now, because its engine is not ready."""


@dataclass(eq=False, slots=True)
class _WorkerSlot:
    """One worker of the pool. `worker` is None while it starts; `failure` is the reason if it is not started again.

    `candidates` is the number of running candidates. `lost` is set when the worker has died and must be replaced.
    """

    worker: Any = None
    failure: str | None = None
    candidates: int = 0
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class WorkerPool:
    """Distributes requests over `count` workers; made by `started_workers`."""

    def __init__(self, settings: Settings, start: StartPipeline, count: int) -> None:
        self._settings = settings
        self._start = start
        self._slots = [_WorkerSlot() for _ in range(count)]
        self._slots_changed = asyncio.Condition()
        self._supervisors = [asyncio.create_task(self._supervise(slot)) for slot in self._slots]

    async def answer(self, request: BestOfNRequest) -> BestOfNResult:
        """The result from the least busy worker; if the worker dies, from another.

        Raises:
            NbestError: the request cannot be answered.
        """
        for _ in range(MAX_TRIES):
            slot = await self._least_busy_slot()
            worker = slot.worker
            slot.candidates += request.best_of
            try:
                answer: BestOfNResult | NbestError = await worker.answer.remote(request)
            except RayTaskError:
                raise
            except RayError as error:
                log.warning("A worker has died; another answers its lines: %s", error)
                self._report_lost(slot, worker)
                continue
            finally:
                slot.candidates -= request.best_of
            if isinstance(answer, WorkerNotReadyError):
                self._report_lost(slot, worker)
                continue
            if isinstance(answer, NbestError):
                raise answer
            return answer
        raise NotReadyError(f"All {MAX_TRIES} workers that ran this line have died; try it again in a run of its own.")

    async def check_ready(self) -> None:
        """Returns if a worker runs or is starting.

        Raises:
            NotReadyError: no worker could be started.
        """
        failures = [slot.failure for slot in self._slots if slot.failure is not None]
        if len(failures) == len(self._slots):
            raise NotReadyError(f"No worker could be started: {failures[0]}")

    async def ready(self) -> None:
        """Returns when the first worker runs.

        Raises:
            StartError: no worker could be started.
        """
        try:
            await self._least_busy_slot()
        except NotReadyError as error:
            raise StartError(error.message) from error

    async def all_ready(self) -> None:
        """Returns when every worker runs or has finally failed to start."""
        async with self._slots_changed:
            await self._slots_changed.wait_for(lambda: all(slot.worker or slot.failure for slot in self._slots))

    async def close(self) -> None:
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(_stop(slot.worker) for slot in self._slots if slot.worker is not None))

    async def _least_busy_slot(self) -> _WorkerSlot:
        """The slot whose worker has the fewest running candidates; waits until a worker runs."""
        async with self._slots_changed:
            await self._slots_changed.wait_for(
                lambda: any(slot.worker for slot in self._slots) or all(slot.failure for slot in self._slots)
            )
        await self.check_ready()
        return min((slot for slot in self._slots if slot.worker), key=lambda slot: slot.candidates)

    async def _supervise(self, slot: _WorkerSlot) -> None:
        """Starts a worker in the slot, and another whenever it dies."""
        failed_starts = 0
        actor = ray.remote(BatchWorker).options(
            num_cpus=self._settings.generator_cpus,
            num_gpus=self._settings.generator_gpus * self._settings.tensor_parallel_size,
            max_concurrency=MAX_CALLS,
        )
        # Inside the worker the engine is supervised as in a server of one process: the worker restarts a dead engine.
        settings = self._settings.model_copy(update={"ray": False, "ray_address": None})
        while True:
            worker = actor.remote(settings, self._start)
            try:
                await worker.start.remote()
            except RayError as error:
                failed_starts += 1
                if failed_starts >= MAX_FAILED_STARTS or not isinstance(error, RayActorError):
                    slot.failure = str(getattr(error, "cause", None) or error)
                    log.error("A worker could not be started; the others continue without it: %s", slot.failure)
                    await self._set_worker(slot, None)
                    return
                continue
            failed_starts = 0
            slot.lost.clear()
            await self._set_worker(slot, worker)
            await slot.lost.wait()
            await _stop(worker)

    async def _set_worker(self, slot: _WorkerSlot, worker: Any) -> None:
        async with self._slots_changed:
            slot.worker = worker
            self._slots_changed.notify_all()

    @staticmethod
    def _report_lost(slot: _WorkerSlot, worker: Any) -> None:
        """Has a dead worker replaced; does nothing if another line has already reported it."""
        if slot.worker is worker:
            slot.worker = None
            slot.lost.set()


async def _stop(worker: Any) -> None:
    """Ends an actor, after asking it to free its engine."""
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await worker.close.remote()
    ray.kill(worker)


@asynccontextmanager
async def started_workers(settings: Settings, start: StartPipeline) -> AsyncIterator[WorkerPool]:
    """Workers on the cluster of the settings until the block is left; entered when the first of them runs.

    Raises:
        ConfigError: no cluster answers at the address of the settings.
        StartError: a model could not be loaded.
    """
    async with entered_in_thread(joined_cluster(settings)):
        workers = WorkerPool(settings, start, replica_range(settings.generator_replicas)[1])
        try:
            await workers.ready()
            yield workers
        finally:
            await workers.close()
