"""Runs many best-of-N requests at once, so that the engine is always full and memory stays bounded.

Two limits, both in candidates, decide when the next row of the input is read:

    generating   candidates in the engine. A candidate releases its slot when it ends, so the next prompts start while
                 the slowest candidates of earlier prompts still run.
    held         candidates in memory, until the line of their prompt is written. If the scorer is slower than the
                 engine, this limit is reached, and the engine waits for the scorer.

`BestOfN.run` overlaps generating and scoring within a prompt; the scheduler overlaps prompts as well.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from reranker.candidate import FailedCandidate
from server.errors import NbestError, NotReadyError, OverloadedError
from server.generation.base import Outcome
from server.offline.errors import OfflineError
from server.offline.records import Failure, Result
from server.offline.run_directory import RunDirectory
from server.offline.tasks import Task
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver

HELD_PER_GENERATING = 4
"""The limit of held candidates, as a multiple of the limit of generating ones."""
SYNC_INTERVAL_S = 1.0
"""Seconds between two syncs to disk: the most work that is lost, and done again, after a crash of the machine."""
MAX_OVERLOADED_TRIES = 10
"""Overload replies of an upstream server for one line that are followed by another try; the next one fails the line."""
OVERLOADED_WAIT_S = 2.0
ENGINE_TIMEOUT_S = 300.0
"""Longest wait for a dead engine to be started again, several failed starts included."""
READY_POLL_S = 1.0

Answer = Callable[[Task, RunObserver], Awaitable[BestOfNResult]]


@dataclass(frozen=True, slots=True)
class BatchBackend:
    """The models that answer tasks. `check_ready` raises NotReadyError while there is no engine."""

    answer: Answer
    check_ready: Callable[[], Awaitable[None]]


class CapacityLimiter:
    """A number of slots. A request for more than the total waits until all are free; one task may wait at a time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._released = asyncio.Event()

    async def acquire(self, count: int) -> None:
        while self._used and self._used + count > self._size:
            self._released.clear()
            await self._released.wait()
        self._used += count

    def release(self, count: int) -> None:
        self._used -= count
        self._released.set()


class LineSlots(RunObserver):
    """The engine slots of one line's candidates; releases each when its candidate ends."""

    def __init__(self, limiter: CapacityLimiter, request: BestOfNRequest) -> None:
        self._limiter = limiter
        self._used = request.at_once
        self._unfinished = request.best_of

    def outcome(self, outcome: Outcome) -> None:
        if isinstance(outcome, FailedCandidate) or outcome.finish_reason is not None:
            self._unfinished -= 1
            if 0 <= self._unfinished < self._used:  # until then a stopping policy may draw another into the slot
                self._used -= 1
                self._limiter.release(1)

    def release_all(self) -> None:
        """Releases the remaining slots; the line has ended."""
        self._limiter.release(self._used)


class BatchScheduler:
    """Answers the rows of an input, and writes a record of each to a run directory.

    `on_record` is called with every record that has been written. `in_flight` is the limit of generating candidates.
    """

    def __init__(
        self,
        backend: BatchBackend,
        directory: RunDirectory,
        on_record: Callable[[Result | Failure], None],
        *,
        in_flight: int,
    ) -> None:
        self._backend = backend
        self._directory = directory
        self._on_record = on_record
        self._generating = CapacityLimiter(in_flight)
        self._held = CapacityLimiter(HELD_PER_GENERATING * in_flight)
        self._not_ready_reason = ""

    async def run(self, rows: Iterable[Task | Failure]) -> None:
        """Answers all rows that have no record yet. Cancelling it keeps the written records and cancels the rest.

        Raises:
            OfflineError: the disk is full, the engine has stopped for good, or the input cannot be read further.
        """
        try:
            async with asyncio.TaskGroup() as group:
                syncing = group.create_task(self._sync_regularly())
                async with asyncio.TaskGroup() as lines:
                    for row in rows:
                        await asyncio.sleep(0)  # lets the engine's outcomes be handled while rows are read
                        if row.line in self._directory.done:
                            continue
                        if isinstance(row, Failure):
                            self._write(row)
                            continue
                        await self._held.acquire(row.request.best_of)
                        await self._generating.acquire(row.request.at_once)
                        lines.create_task(self._run_line(row))
                syncing.cancel()
        except BaseExceptionGroup as errors:
            raise _first_error(errors) from errors

    async def _run_line(self, task: Task) -> None:
        slots = LineSlots(self._generating, task.request)
        try:
            self._write(task.result(await self._answer(task, slots)))
        except NbestError as error:
            self._write(Failure(custom_id=task.custom_id, line=task.line, reason=error.message, param=error.param))
        finally:
            slots.release_all()
            self._held.release(task.request.best_of)

    async def _answer(self, task: Task, observer: RunObserver) -> BestOfNResult:
        """Answers a task; if the engine died meanwhile, waits for the next engine and tries once more."""
        try:
            return await self._answer_when_not_overloaded(task, observer)
        except NotReadyError:
            if await self._is_ready():
                raise  # the engine is well, so the line itself has failed
        await self._wait_for_engine()
        return await self._answer_when_not_overloaded(task, observer)

    async def _answer_when_not_overloaded(self, task: Task, observer: RunObserver) -> BestOfNResult:
        """Waits and tries again while an upstream server is overloaded, which it reports before it draws anything."""
        for _ in range(MAX_OVERLOADED_TRIES):
            with contextlib.suppress(OverloadedError):
                return await self._backend.answer(task, observer)
            await asyncio.sleep(OVERLOADED_WAIT_S)
        return await self._backend.answer(task, observer)

    async def _is_ready(self) -> bool:
        try:
            await self._backend.check_ready()
        except NotReadyError as error:
            self._not_ready_reason = error.message
            return False
        return True

    async def _wait_for_engine(self) -> None:
        """Returns when the engine is ready again.

        Raises:
            OfflineError: it was not ready within `ENGINE_TIMEOUT_S`.
        """
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                while True:
                    await asyncio.sleep(READY_POLL_S)
                    if await self._is_ready():
                        return
        except TimeoutError:
            raise OfflineError(
                f"The engine has stopped ({self._not_ready_reason}); finished lines are kept, and the same command "
                "continues with the rest"
            ) from None

    def _write(self, record: Result | Failure) -> None:
        self._directory.write(record)
        self._on_record(record)

    async def _sync_regularly(self) -> None:
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            await asyncio.to_thread(self._directory.sync)


def _first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that came first; it cancelled the other tasks, and any later error is a consequence of it."""
    error = errors.exceptions[0]
    return _first_error(error) if isinstance(error, BaseExceptionGroup) else error
