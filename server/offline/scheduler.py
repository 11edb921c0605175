"""Many best-of-N requests at once: the engine is kept full, and no more is held in memory than that takes.

Two counts, both in candidates, decide when the next row of the input is read:

    drawing   under way in the engine; each leaves the moment it ends, so a prompt's stragglers let others in
    held      in memory, until their prompt's line is written; a scorer that is slower than the engine fills this one
              up, and then the engine waits for it

`BestOfN.run` overlaps generating and scoring within a prompt; here prompts overlap as well.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from reranker.candidate import FailedCandidate
from server.errors import NbestError, NotReadyError, OverloadedError
from server.generation.base import Outcome
from server.offline.errors import OfflineError
from server.offline.records import Failure, Result
from server.offline.run_directory import RunDirectory
from server.offline.tasks import Task
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver

HELD_PER_DRAWING = 4
SYNC_EVERY_S = 1.0
"""So much work at most is done again after the machine itself has died."""
MAX_SHEDDINGS = 10
"""So often an upstream server may put a line off before it has failed."""
BUSY_WAIT_S = 2.0
ENGINE_TIMEOUT_S = 300.0
"""Longest wait for the engine after one that has died, several failed starts included."""
LOOK_AGAIN_S = 1.0

Answer = Callable[[Task, RunObserver], Awaitable[BestOfNResult]]


class Listener(Protocol):
    """Hears what becomes of the lines."""

    def wrote(self, record: Result | Failure) -> None: ...


class CapacityLimiter:
    """So many fit in; whoever is larger than the room waits until it is empty. For one task that enters."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._inside = 0
        self._left = asyncio.Event()

    async def enter(self, count: int) -> None:
        while self._inside and self._inside + count > self._size:
            self._left.clear()
            await self._left.wait()
        self._inside += count

    def leave(self, count: int) -> None:
        self._inside -= count
        self._left.set()


class SlotsOfLine(RunObserver):
    """The places of one line's candidates in the engine; each is given back when its candidate ends."""

    def __init__(self, engine: CapacityLimiter, request: BestOfNRequest) -> None:
        self._engine = engine
        self._used = request.at_once
        self._unfinished = request.best_of

    def outcome(self, outcome: Outcome) -> None:
        if isinstance(outcome, FailedCandidate) or outcome.finish_reason is not None:
            self._unfinished -= 1
            if 0 <= self._unfinished < self._used:  # a stopping policy may still draw into the places before that
                self._used -= 1
                self._engine.leave(1)

    def leave_all(self) -> None:
        """Gives back what is left; the line has ended."""
        self._engine.leave(self._used)


class Run:
    """Answers the rows of an input into a directory. `check_ready` tells a line's failure from the engine's end."""

    def __init__(
        self,
        answer: Answer,
        check_ready: Callable[[], Awaitable[None]],
        directory: RunDirectory,
        listener: Listener,
        *,
        in_flight: int,
    ) -> None:
        self._answer = answer
        self._check_ready = check_ready
        self._directory = directory
        self._listener = listener
        self._drawing = CapacityLimiter(in_flight)
        self._held = CapacityLimiter(HELD_PER_DRAWING * in_flight)
        self._trouble = ""  # why there is no engine

    async def through(self, rows: Iterable[Task | Failure]) -> None:
        """Answers all rows that have no record yet. Cancelling it keeps what is written and gives up the rest.

        Raises:
            OfflineError: the disk is full, the engine has stopped, or the input cannot be read on.
        """
        try:
            async with asyncio.TaskGroup() as group:
                syncing = group.create_task(self._sync_now_and_then())
                async with asyncio.TaskGroup() as lines:
                    for row in rows:
                        await asyncio.sleep(0)  # reading must not keep the engine's answers waiting
                        if row.line in self._directory.done:
                            continue
                        if isinstance(row, Failure):
                            self._write(row)
                            continue
                        await self._held.enter(row.request.best_of)
                        await self._drawing.enter(row.request.at_once)
                        lines.create_task(self._line(row))
                syncing.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors

    async def _line(self, task: Task) -> None:
        slots = SlotsOfLine(self._drawing, task.request)
        try:
            self._write(task.result(await self._answered(task, slots)))
        except NbestError as error:
            self._write(Failure(custom_id=task.custom_id, line=task.line, reason=error.message, param=error.param))
        finally:
            slots.leave_all()
            self._held.leave(task.request.best_of)

    async def _answered(self, task: Task, observer: RunObserver) -> BestOfNResult:
        """Asks once more where it was the engine that failed, as soon as the next one is there."""
        try:
            return await self._answered_when_not_busy(task, observer)
        except NotReadyError:
            if await self._is_ready():
                raise  # the line's own failure
        await self._engine_is_back()
        return await self._answered_when_not_busy(task, observer)

    async def _answered_when_not_busy(self, task: Task, observer: RunObserver) -> BestOfNResult:
        """Waits and asks again where an upstream server is too busy, which it says before it has drawn anything."""
        for _ in range(MAX_SHEDDINGS):
            with contextlib.suppress(OverloadedError):
                return await self._answer(task, observer)
            await asyncio.sleep(BUSY_WAIT_S)
        return await self._answer(task, observer)

    async def _is_ready(self) -> bool:
        try:
            await self._check_ready()
        except NotReadyError as error:
            self._trouble = error.message
            return False
        return True

    async def _engine_is_back(self) -> None:
        """Returns when there is an engine again.

        Raises:
            OfflineError: there has been none for too long.
        """
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                while True:
                    await asyncio.sleep(LOOK_AGAIN_S)
                    if await self._is_ready():
                        return
        except TimeoutError:
            raise OfflineError(
                f"The engine has stopped ({self._trouble}); what is done is kept, and the same command goes on with "
                "the rest"
            ) from None

    def _write(self, record: Result | Failure) -> None:
        self._directory.write(record)
        self._listener.wrote(record)

    async def _sync_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(SYNC_EVERY_S)
            await asyncio.to_thread(self._directory.sync)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first; the others went the same way, or were on the way when it did."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
