"""Many prompts at once: what is let in when, and what ends a run."""

import asyncio
from collections.abc import Iterator
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
from server.offline.scheduler import HELD_PER_DRAWING, Answer, CapacityLimiter, Run
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


class Watching:
    """A run over doubles, the rows it has read, and the records it has written."""

    def __init__(self, out: Path, answer: Answer | None = None, check_ready: NotReadyError | None = None) -> None:
        self.pipeline = BestOfN(ScriptedGenerator(["a", "bb"]), {"length": ScriptedScorer()})
        self.directory = RunDirectory(out)
        self.read = 0
        self.written: list[Result | Failure] = []
        self.most_held = 0
        self._not_ready = check_ready
        self._told_at = (0, asyncio.Event())
        self.run = Run(answer or self.answer, self.check_ready, self.directory, self, in_flight=IN_FLIGHT)

    async def answer(self, task: Task, observer: RunObserver) -> BestOfNResult:
        return await self.pipeline.run(task.request, observer)

    async def check_ready(self) -> None:
        if self._not_ready:
            raise self._not_ready

    def wrote(self, record: Result | Failure) -> None:
        self.written.append(record)
        if len(self.written) == self._told_at[0]:
            self._told_at[1].set()

    def done_after(self, count: int, event: asyncio.Event) -> None:
        """Sets the event when so many records are written."""
        self._told_at = (count, event)

    def rows(self, count: int) -> Iterator[Task]:
        for line in range(1, count + 1):
            self.read += 1
            self.most_held = max(self.most_held, self.read - len(self.written))
            yield task(line)

    @property
    def lines(self) -> list[int]:
        return [record.line for record in self.written]


async def test_every_row_gets_its_record(tmp_path: Path) -> None:
    watching = Watching(tmp_path)
    await watching.run.through(watching.rows(50))
    assert sorted(watching.lines) == list(range(1, 51))
    assert len(watching.directory.done) == 50


async def test_rows_are_read_no_faster_than_they_are_answered(tmp_path: Path) -> None:
    """What makes the memory of a run independent of the length of its input."""
    watching = Watching(tmp_path)
    await watching.run.through(watching.rows(2000))
    assert len(watching.written) == 2000
    assert watching.most_held <= HELD_PER_DRAWING * IN_FLIGHT / BEST_OF + 1


async def test_rows_that_have_a_record_are_not_answered_again(tmp_path: Path) -> None:
    first = Watching(tmp_path)
    await first.run.through(first.rows(20))
    second = Watching(tmp_path)
    await second.run.through(second.rows(25))
    assert sorted(second.lines) == [21, 22, 23, 24, 25]


async def test_the_candidates_of_many_prompts_are_under_way_at_once(tmp_path: Path) -> None:
    under_way, most = set[int](), 0

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        nonlocal most
        under_way.add(task.line)
        most = max(most, len(under_way))
        result = await watching.answer(task, observer)
        under_way.remove(task.line)
        return result

    watching = Watching(tmp_path, answer)
    await watching.run.through(watching.rows(100))
    assert most >= IN_FLIGHT / BEST_OF


async def test_a_prompt_with_a_straggler_gives_the_places_of_its_other_candidates_to_the_next(tmp_path: Path) -> None:
    """Line 1 fills the room; 7 of its 8 end. Lines of 7 then fit beside the last, which waits until they are done."""
    others_done = asyncio.Event()

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if task.line > 1:
            return await watching.answer(task, observer)
        for index in range(IN_FLIGHT - 1):
            observer.outcome(Candidate(index, "a", num_tokens=1, finish_reason="stop"))
        await others_done.wait()
        return await watching.answer(task, RunObserver())

    watching = Watching(tmp_path, answer)
    watching.done_after(10, others_done)
    first, *others = watching.rows(11)
    sizes = [replace(first, request=replace(first.request, best_of=IN_FLIGHT))]
    sizes += [replace(one, request=replace(one.request, best_of=IN_FLIGHT - 1)) for one in others]
    await watching.run.through(sizes)
    assert watching.lines[-1] == 1


async def test_a_prompt_that_is_drawn_in_waves_takes_the_room_of_one_wave(tmp_path: Path) -> None:
    """Each may draw as many as the room holds, one at a time; all four that are held are then under way at once."""
    under_way, most = set[int](), 0

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        nonlocal most
        under_way.add(task.line)
        most = max(most, len(under_way))
        result = await watching.answer(task, observer)
        under_way.remove(task.line)
        return result

    stopping = Stopping("adaptive", waves=AdaptiveN(IN_FLIGHT, price=1e-9, wave=1))
    watching = Watching(tmp_path, answer)
    rows = watching.rows(12)
    await watching.run.through(
        replace(row, request=replace(row.request, best_of=IN_FLIGHT, stopping=stopping)) for row in rows
    )
    assert most == HELD_PER_DRAWING
    assert len(watching.lines) == 12


async def test_a_scorer_slower_than_the_engine_holds_the_reading_back(tmp_path: Path) -> None:
    """All candidates are drawn at once, and none is scored before the reader has stopped."""
    scored = asyncio.Event()

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        result = await watching.answer(task, observer)
        await scored.wait()
        return result

    watching = Watching(tmp_path, answer)
    running = asyncio.create_task(watching.run.through(watching.rows(1000)))
    before = -1
    while watching.read != before:  # until nothing moves any more
        before = watching.read
        for _ in range(100):
            await asyncio.sleep(0)
    assert watching.read == HELD_PER_DRAWING * IN_FLIGHT / BEST_OF + 1
    scored.set()
    await running
    assert len(watching.written) == 1000


async def test_a_prompt_larger_than_the_room_goes_alone() -> None:
    room = CapacityLimiter(4)
    await room.enter(9)
    waiting = asyncio.create_task(room.enter(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    room.leave(9)
    await waiting


async def test_a_line_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if task.line == 2:
            raise GenerationError("All 2 candidates failed.")
        return await watching.answer(task, observer)

    watching = Watching(tmp_path, answer)
    await watching.run.through(watching.rows(3))
    (failure,) = [one for one in watching.written if isinstance(one, Failure)]
    assert (failure.line, failure.custom_id, failure.reason) == (2, "2", "All 2 candidates failed.")
    assert sorted(watching.lines) == [1, 2, 3]


async def test_an_engine_that_does_not_come_back_ends_the_run_and_fails_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.offline.scheduler.ENGINE_TIMEOUT_S", 0.01)

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if len(watching.written) >= 10:
            raise NotReadyError("The engine stopped while it was answering.")
        return await watching.answer(task, observer)

    watching = Watching(tmp_path, answer, check_ready=NotReadyError("it is dead"))
    with pytest.raises(OfflineError, match=r"The engine has stopped \(it is dead\); what is done is kept"):
        await watching.run.through(watching.rows(100))
    assert all(isinstance(one, Result) for one in watching.written)
    again = Watching(tmp_path)
    await again.run.through(again.rows(100))
    assert sorted(watching.lines + again.lines) == list(range(1, 101))


async def test_lines_under_a_dying_engine_are_answered_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies under line 3 when one of its two candidates has ended, and is there again at the third look."""
    monkeypatch.setattr("server.offline.scheduler.LOOK_AGAIN_S", 0)
    looks = iter([NotReadyError("starting")] * 2)

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if task.line == 3 and next(dies, False):
            observer.outcome(Candidate(0, "a", num_tokens=1, finish_reason="stop"))
            raise NotReadyError("The engine died while it was answering.")
        return await watching.answer(task, observer)

    async def check_ready() -> None:
        if (trouble := next(looks, None)) is not None:
            raise trouble

    dies = iter([True])
    watching = Watching(tmp_path, answer)
    monkeypatch.setattr(watching.run, "_check_ready", check_ready)
    await watching.run.through(watching.rows(10))
    assert sorted(watching.lines) == list(range(1, 11))
    assert all(isinstance(one, Result) for one in watching.written)


async def test_a_busy_upstream_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.offline.scheduler.BUSY_WAIT_S", 0)
    sheddings = iter(range(3))

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        if next(sheddings, None) is not None:
            raise OverloadedError("later", retry_after_s=1)
        return await watching.answer(task, observer)

    watching = Watching(tmp_path, answer)
    await watching.run.through(watching.rows(1))
    assert isinstance(watching.written[0], Result)


async def test_a_mistake_of_ours_is_not_taken_for_a_failed_line(tmp_path: Path) -> None:
    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        raise ZeroDivisionError

    watching = Watching(tmp_path, answer)
    with pytest.raises(ZeroDivisionError):
        await watching.run.through(watching.rows(3))
    assert watching.written == []


async def test_cancelling_keeps_what_is_written_and_cancels_what_is_drawn(tmp_path: Path) -> None:
    watching = Watching(tmp_path)
    slow = ScriptedGenerator(["a", "bb"], delays_s={0: 60})
    watching.pipeline = BestOfN(slow, {"length": ScriptedScorer()})
    running = asyncio.create_task(watching.run.through(watching.rows(10)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(slow.calls) == IN_FLIGHT - 1, "so many first candidates leave no place for two more"
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert slow.cancelled.count(0) == len(slow.calls)
    assert watching.written == []
