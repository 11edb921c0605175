"""The batch scheduler: when rows are read, how many candidates run at once, and which errors end a run."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from reranker.candidate import Candidate, Prompt
from reranker.stopping import AdaptiveN, Stopping
from server.errors import GenerationError, NotReadyError, OverloadedError
from server.generation.base import SamplingParams
from server.offline.errors import OfflineError
from server.offline.records import Failure, Result
from server.offline.run_directory import RunDirectory
from server.offline.scheduler import (
    HELD_PER_GENERATING,
    Answer,
    BatchBackend,
    BatchScheduler,
    CapacityLimiter,
)
from server.offline.tasks import Task
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver
from tests.support.doubles import ScriptedGenerator, ScriptedScorer

IN_FLIGHT = 8
BEST_OF = 2


def task(line: int) -> Task:
    return Task(
        line, str(line), BestOfNRequest(Prompt(text=f"prompt {line}"), SamplingParams(), BEST_OF), "scripted", {}
    )


class RecordedRun:
    """A scheduler over doubles; records the rows that it reads and the records that it writes."""

    def __init__(
        self, out: Path, answer: Answer | None = None, check_ready: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self.pipeline = BestOfN(ScriptedGenerator(["a", "bb"]), {"length": ScriptedScorer()})
        self.directory = RunDirectory(out)
        self.read = 0
        self.written: list[Result | Failure] = []
        self.most_held = 0
        self._awaited = (0, asyncio.Event())
        backend = BatchBackend(answer or self.answer, check_ready or self.pipeline.check_ready)
        self.scheduler = BatchScheduler(backend, self.directory, self._on_record, in_flight=IN_FLIGHT)

    async def answer(self, task: Task, observer: RunObserver) -> BestOfNResult:
        return await self.pipeline.run(task.request, observer)

    def set_after(self, count: int, event: asyncio.Event) -> None:
        """Sets the event when this number of records has been written."""
        self._awaited = (count, event)

    def rows(self, count: int) -> Iterator[Task]:
        for line in range(1, count + 1):
            self.read += 1
            self.most_held = max(self.most_held, self.read - len(self.written))
            yield task(line)

    @property
    def lines(self) -> list[int]:
        return [record.line for record in self.written]

    def _on_record(self, record: Result | Failure) -> None:
        self.written.append(record)
        count, event = self._awaited
        if len(self.written) == count:
            event.set()


class RunningLines:
    """Counts the lines that are answered at the same time."""

    def __init__(self) -> None:
        self.most = 0
        self._lines: set[int] = set()

    def __call__(self, answer: Answer) -> Answer:
        async def counted(task: Task, observer: RunObserver) -> BestOfNResult:
            self._lines.add(task.line)
            self.most = max(self.most, len(self._lines))
            result = await answer(task, observer)
            self._lines.remove(task.line)
            return result

        return counted


async def test_every_row_gets_a_record(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path)
    await run.scheduler.run(run.rows(50))
    assert sorted(run.lines) == list(range(1, 51))
    assert len(run.directory.done) == 50


async def test_rows_are_read_no_faster_than_they_are_answered(tmp_path: Path) -> None:
    """So the memory of a run does not depend on the length of its input."""
    run = RecordedRun(tmp_path)
    await run.scheduler.run(run.rows(2000))
    assert len(run.written) == 2000
    assert run.most_held <= HELD_PER_GENERATING * IN_FLIGHT / BEST_OF + 1


async def test_rows_that_have_a_record_are_not_answered_again(tmp_path: Path) -> None:
    first = RecordedRun(tmp_path)
    await first.scheduler.run(first.rows(20))
    second = RecordedRun(tmp_path)
    await second.scheduler.run(second.rows(25))
    assert sorted(second.lines) == [21, 22, 23, 24, 25]


async def test_several_prompts_run_at_the_same_time(tmp_path: Path) -> None:
    running = RunningLines()
    run = RecordedRun(tmp_path, running(lambda task, observer: run.answer(task, observer)))
    await run.scheduler.run(run.rows(100))
    assert running.most >= IN_FLIGHT / BEST_OF


async def test_slots_of_finished_candidates_are_used_while_the_slowest_candidate_of_a_prompt_runs(
    tmp_path: Path,
) -> None:
    """Line 1 takes all 8 slots, and 7 of its candidates end; its last ends after ten lines of 7 candidates each."""
    others_done = asyncio.Event()

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if task.line > 1:
            return await run.answer(task, observer)
        for index in range(IN_FLIGHT - 1):
            observer.outcome(Candidate(index, "a", num_tokens=1, finish_reason="stop"))
        await others_done.wait()
        return await run.answer(task, RunObserver())

    run = RecordedRun(tmp_path, answer)
    run.set_after(10, others_done)
    first, *others = run.rows(11)
    rows = [replace(first, request=replace(first.request, best_of=IN_FLIGHT))]
    rows += [replace(row, request=replace(row.request, best_of=IN_FLIGHT - 1)) for row in others]
    await run.scheduler.run(rows)
    assert run.lines[-1] == 1


async def test_a_prompt_that_is_drawn_in_waves_takes_the_slots_of_one_wave(tmp_path: Path) -> None:
    """Each of 12 prompts draws up to 8 candidates, one at a time, so all 4 prompts that may be held run at once."""
    running = RunningLines()
    run = RecordedRun(tmp_path, running(lambda task, observer: run.answer(task, observer)))
    stopping = Stopping("adaptive", waves=AdaptiveN(IN_FLIGHT, price=1e-9, wave=1))
    await run.scheduler.run(
        replace(row, request=replace(row.request, best_of=IN_FLIGHT, stopping=stopping)) for row in run.rows(12)
    )
    assert running.most == HELD_PER_GENERATING
    assert len(run.lines) == 12


async def test_no_more_rows_are_read_while_the_scorer_is_slower_than_the_engine(tmp_path: Path) -> None:
    """Generating takes no time, and nothing is scored until the scheduler has stopped reading."""
    scored = asyncio.Event()

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        result = await run.answer(task, observer)
        await scored.wait()
        return result

    run = RecordedRun(tmp_path, answer)
    running = asyncio.create_task(run.scheduler.run(run.rows(1000)))
    before = -1
    while run.read != before:  # until no more rows are read
        before = run.read
        for _ in range(100):
            await asyncio.sleep(0)
    assert run.read == HELD_PER_GENERATING * IN_FLIGHT / BEST_OF + 1
    scored.set()
    await running
    assert len(run.written) == 1000


async def test_a_request_for_more_than_all_slots_runs_alone() -> None:
    limiter = CapacityLimiter(4)
    await limiter.acquire(9)
    waiting = asyncio.create_task(limiter.acquire(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    limiter.release(9)
    await waiting


async def test_a_failed_line_has_its_reason_and_the_others_are_answered(tmp_path: Path) -> None:
    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if task.line == 2:
            raise GenerationError("All 2 candidates failed.")
        return await run.answer(task, observer)

    run = RecordedRun(tmp_path, answer)
    await run.scheduler.run(run.rows(3))
    (failure,) = [record for record in run.written if isinstance(record, Failure)]
    assert (failure.line, failure.custom_id, failure.reason) == (2, "2", "All 2 candidates failed.")
    assert sorted(run.lines) == [1, 2, 3]


async def test_an_engine_that_stays_dead_ends_the_run_and_fails_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.offline.scheduler.ENGINE_TIMEOUT_S", 0.01)

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if len(run.written) >= 10:
            raise NotReadyError("The engine stopped while it was answering.")
        return await run.answer(task, observer)

    async def check_ready() -> None:
        raise NotReadyError("it is dead")

    run = RecordedRun(tmp_path, answer, check_ready)
    with pytest.raises(OfflineError, match=r"The engine has stopped \(it is dead\); finished lines are kept"):
        await run.scheduler.run(run.rows(100))
    assert all(isinstance(record, Result) for record in run.written)
    continued = RecordedRun(tmp_path)
    await continued.scheduler.run(continued.rows(100))
    assert sorted(run.lines + continued.lines) == list(range(1, 101))


async def test_a_line_whose_engine_died_is_answered_by_the_next_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine dies when one of the two candidates of line 3 has ended, and is ready at the third check."""
    monkeypatch.setattr("server.offline.scheduler.READY_POLL_S", 0)
    deaths = iter([True])
    checks = iter([NotReadyError("starting")] * 2)

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if task.line == 3 and next(deaths, False):
            observer.outcome(Candidate(0, "a", num_tokens=1, finish_reason="stop"))
            raise NotReadyError("The engine died while it was answering.")
        return await run.answer(task, observer)

    async def check_ready() -> None:
        if (error := next(checks, None)) is not None:
            raise error

    run = RecordedRun(tmp_path, answer, check_ready)
    await run.scheduler.run(run.rows(10))
    assert sorted(run.lines) == list(range(1, 11))
    assert all(isinstance(record, Result) for record in run.written)


async def test_an_overloaded_upstream_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.offline.scheduler.OVERLOADED_WAIT_S", 0)
    rejections = iter(range(3))

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if next(rejections, None) is not None:
            raise OverloadedError("later", retry_after_s=1)
        return await run.answer(task, observer)

    run = RecordedRun(tmp_path, answer)
    await run.scheduler.run(run.rows(1))
    assert isinstance(run.written[0], Result)


async def test_a_bug_ends_the_run_and_is_not_written_as_a_failed_line(tmp_path: Path) -> None:
    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        raise ZeroDivisionError

    run = RecordedRun(tmp_path, answer)
    with pytest.raises(ZeroDivisionError):
        await run.scheduler.run(run.rows(3))
    assert run.written == []


async def test_cancelling_a_run_cancels_its_candidates(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path)
    generator = ScriptedGenerator(["a", "bb"], delays_s={0: 60})
    run.pipeline = BestOfN(generator, {"length": ScriptedScorer()})
    running = asyncio.create_task(run.scheduler.run(run.rows(10)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(generator.calls) == IN_FLIGHT - 1, "each prompt keeps one slot, so at 7 there is no room for two more"
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert generator.cancelled.count(0) == len(generator.calls)
    assert run.written == []
