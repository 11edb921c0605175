"""Engines die, one after another; requests go on with the next, and what cannot be saved is told."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from reranker.candidate import Candidate, Prompt
from server.errors import DeadlineError, EngineDiedError, NotReadyError
from server.generation.base import Outcome, SamplingParams
from server.generation.supervisor import Patience, SupervisedGenerator
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN, BestOfNRequest, BestOfNResult
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, app_over, client_of

TIMEOUT_S = 10
"""Far more than anything here takes; only what hangs meets it."""


class Engines:
    """Hands out scripted engines in turn; a start after the first waits for `go`, and an exception fails it."""

    def __init__(self, *engines: ScriptedGenerator | Exception) -> None:
        self.left = list(engines)
        self.go = asyncio.Event()
        self.starts = 0
        self.recovered = asyncio.Event()
        self.recoveries_s: list[float] = []

    async def start(self) -> ScriptedGenerator:
        self.starts += 1
        if self.starts > 1:
            await self.go.wait()
        engine = self.left.pop(0)
        if isinstance(engine, Exception):
            raise engine
        return engine

    def heard(self, recovery_s: float) -> None:
        self.recoveries_s.append(recovery_s)
        self.recovered.set()

    @asynccontextmanager
    async def supervised(self, patience: Patience | None = None) -> AsyncIterator[SupervisedGenerator]:
        patience = patience or Patience(watch_every_s=0.01, sound_after_s=0)
        generator = await SupervisedGenerator.create(self.start, patience=patience, on_restart=self.heard)
        async with asyncio.timeout(TIMEOUT_S):
            try:
                yield generator
            finally:
                await generator.close()


def scripted(*texts: str, slow: dict[int, float] | None = None, word_delay_s: float = 0) -> ScriptedGenerator:
    return ScriptedGenerator(texts, delays_s=slow, word_delay_s=word_delay_s)


NEVER = 3600.0
"""An engine writes for so long, unless it dies or is cancelled."""


def running(
    generator: SupervisedGenerator,
    best_of: int = 3,
    heard: list[Outcome] | None = None,
    deadline_s: float | None = None,
) -> "asyncio.Task[BestOfNResult]":
    served = BestOfN(generator, {"scripted-reward": ScriptedScorer()})
    request = BestOfNRequest(Prompt(text="Well?"), SamplingParams(seed=5), best_of, deadline_s=deadline_s)
    return asyncio.create_task(served.run(request, None if heard is None else heard.append))


async def until(holds: Callable[[], bool]) -> None:
    while True:
        if holds():
            return
        await asyncio.sleep(0)


async def under_way(engine: ScriptedGenerator, requests: int = 1) -> None:
    """Until that many requests have reached the engine and its candidates are being written."""
    await until(lambda: len(engine.running) >= requests)


async def refused(generator: SupervisedGenerator) -> str:
    """What is told, once the death has been noticed, to those who ask whether there is an engine."""
    while True:
        try:
            _ = generator.engine
        except NotReadyError as error:
            return error.message
        await asyncio.sleep(0.001)


async def test_an_idle_engine_that_dies_is_replaced_and_told_of_meanwhile() -> None:
    first, second = scripted("a"), scripted("b")
    engines = Engines(first, second)
    async with engines.supervised() as generator:
        await generator.check_ready()
        first.die()
        assert await refused(generator) == "The engine has died and is starting again; try again in a few seconds."
        with pytest.raises(NotReadyError):
            await running(generator)
        engines.go.set()
        await engines.recovered.wait()
        await generator.check_ready()
        assert generator.engine is second
        assert (await running(generator)).selection.winner.candidate.text == "b"
    assert first.closed
    assert second.closed
    assert len(engines.recoveries_s) == 1


async def test_twenty_requests_under_way_are_answered_by_the_next_engine() -> None:
    first, second = scripted("old", slow=dict.fromkeys(range(3), NEVER)), scripted("new")
    engines = Engines(first, second)
    engines.go.set()
    async with engines.supervised() as generator:
        requests = [running(generator) for _ in range(20)]
        await under_way(first, 20)
        first.die()
        results = await asyncio.gather(*requests)
    assert {result.selection.winner.candidate.text for result in results} == {"new"}
    assert {(result.completed, result.failed, result.cancelled) for result in results} == {(3, 0, 0)}


async def test_what_had_finished_is_kept_and_the_rest_keeps_its_seeds() -> None:
    first = scripted("kept", "lost", "kept too", slow={1: NEVER})
    second = scripted("unwanted", "drawn again", "unwanted", slow={0: NEVER, 2: NEVER})
    engines = Engines(first, second)
    engines.go.set()
    heard: list[Outcome] = []
    async with engines.supervised() as generator:
        request = running(generator, heard=heard)
        await until(lambda: len(heard) == 2)
        first.die()
        result = await request
    texts = {one.candidate.index: one.candidate.text for one in result.selection.ranking}
    assert texts == {0: "kept", 1: "drawn again", 2: "kept too"}
    assert sorted(one.index for one in heard) == [0, 1, 2]
    assert second.cancelled == [0, 2], "candidates that were had already"
    assert second.calls == first.calls == [(Prompt(text="Well?"), SamplingParams(seed=5), 3)]


async def test_a_request_is_drawn_again_only_once() -> None:
    first, second, third = (scripted("a", slow=dict.fromkeys(range(3), NEVER)) for _ in range(3))
    engines = Engines(first, second, third)
    engines.go.set()
    async with engines.supervised() as generator:
        request = running(generator)
        await under_way(first)
        first.die()
        await under_way(second)
        second.die()
        with pytest.raises(EngineDiedError):
            await request
    assert third.calls == []


async def test_text_that_was_handed_on_while_it_grew_is_not_drawn_again() -> None:
    first, second = scripted("one two three", word_delay_s=NEVER), scripted("other words")
    engines = Engines(first, second)
    engines.go.set()
    heard: list[Outcome] = []
    async with engines.supervised() as generator:
        request = running(generator, best_of=1, heard=heard)
        await until(lambda: bool(heard))
        first.die()
        with pytest.raises(EngineDiedError):
            await request
    assert [one.text for one in heard if isinstance(one, Candidate)] == ["one"]
    assert second.calls == []


async def test_a_deadline_ends_the_wait_for_the_next_engine() -> None:
    first = scripted("early", "late", slow={1: NEVER})
    none_early = scripted("late", slow={0: NEVER})
    heard: list[Outcome] = []
    async with Engines(first, scripted("b")).supervised() as generator:
        request = running(generator, best_of=2, heard=heard, deadline_s=0.5)
        await until(lambda: bool(heard))
        first.die()
        result = await request
    assert (result.selection.winner.candidate.text, result.stopped_by, result.cancelled) == ("early", "deadline", 1)
    async with Engines(none_early, scripted("b")).supervised() as generator:
        request = running(generator, best_of=1, deadline_s=0.2)
        await under_way(none_early)
        none_early.die()
        with pytest.raises(DeadlineError):
            await request


async def test_a_request_that_is_cancelled_while_it_waits_is_not_drawn_again() -> None:
    first, second = scripted("a", slow=dict.fromkeys(range(3), NEVER)), scripted("b")
    engines = Engines(first, second)
    async with engines.supervised() as generator:
        request = running(generator)
        await under_way(first)
        first.die()
        await refused(generator)
        request.cancel()
        engines.go.set()
        await engines.recovered.wait()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert second.calls == []


async def test_a_start_that_fails_is_told_and_tried_again() -> None:
    first, third = scripted("a", slow=dict.fromkeys(range(3), NEVER)), scripted("c")
    engines = Engines(first, NotReadyError("The disk is full; make room."), RuntimeError("hunter2"), third)
    engines.go.set()
    told = "The engine has died and could not be started again. The disk is full; make room."
    async with engines.supervised(Patience(watch_every_s=0.01, sound_after_s=0, wait_s=0.05)) as generator:
        request = running(generator)
        await under_way(first)
        first.die()
        with pytest.raises(NotReadyError, match=told):
            await request
        await engines.recovered.wait()
        assert engines.starts == 4
        assert (await running(generator)).selection.winner.candidate.text == "c"


async def test_engines_that_die_one_after_another_are_waited_for_by_nobody() -> None:
    first, second = scripted("a"), scripted("b", slow=dict.fromkeys(range(3), NEVER))
    engines = Engines(first, second, scripted("c"))
    engines.go.set()
    async with engines.supervised(Patience(watch_every_s=0.01, sound_after_s=NEVER, wait_s=NEVER)) as generator:
        first.die()
        await engines.recovered.wait()
        request = running(generator)
        await under_way(second)
        second.die()
        with pytest.raises(NotReadyError, match="after 2 failures in a row, is in at most 60 s"):
            await request
        with pytest.raises(NotReadyError, match="die one after another"):
            await generator.check_ready()
    assert engines.starts == 2


async def test_closing_gives_up_a_start_under_way() -> None:
    first = scripted("a", slow=dict.fromkeys(range(3), NEVER))
    engines = Engines(first, scripted("b"))
    async with engines.supervised() as generator:
        request = running(generator)
        await under_way(first)
        first.die()
        await refused(generator)
        await generator.close()
        with pytest.raises(NotReadyError, match="stopping"):
            await request
    assert engines.starts == 2
    assert len(engines.left) == 1


async def test_the_first_start_is_the_callers_to_handle() -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        await SupervisedGenerator.create(Engines(RuntimeError("no such model")).start)


@pytest.mark.parametrize(("deaths", "wait_s"), [(1, 0), (2, 2), (3, 4), (4, 8), (6, 32), (7, 60), (1_000_000, 60)])
def test_the_wait_doubles_from_the_second_death_in_a_row(deaths: int, wait_s: float) -> None:
    assert Patience().before_start(deaths) == wait_s


async def test_over_http_ready_is_503_and_health_200_until_the_next_engine() -> None:
    first = scripted("a", slow=dict.fromkeys(range(4), NEVER))
    engines, metrics = Engines(first, scripted("b")), Metrics()
    async with engines.supervised() as generator:
        app = app_over(BestOfN(generator, {"scripted-reward": ScriptedScorer()}), metrics)
        async with client_of(app) as client:
            under_death = asyncio.create_task(client.post("/v1/chat/completions", json=HELLO))
            await under_way(first)
            first.die()
            await refused(generator)
            for reply in [await client.get("/ready"), await client.post("/v1/chat/completions", json=HELLO)]:
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
                assert reply.headers["Retry-After"] == "5"
            assert (await client.get("/health")).status_code == 200
            engines.go.set()
            answer = await under_death
            assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "b")
            assert (await client.get("/ready")).status_code == 200
    assert metrics.registry.get_sample_value("nbest_candidates_in_flight") == 0
