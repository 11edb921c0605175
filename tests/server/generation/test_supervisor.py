"""When an engine dies, its requests continue on the next engine; those that cannot fail with a clear error."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from reranker.candidate import Candidate, Prompt
from server.errors import DeadlineError, EngineDiedError, NotReadyError
from server.generation.base import SamplingParams
from server.generation.supervisor import RestartPolicy, SupervisedGenerator
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.observers import RecordingObserver
from tests.support.serving import HELLO, app_over, client_of

TIMEOUT_S = 10
"""Far more than any test here takes; only a hanging test reaches it."""


class Engines:
    """Starts scripted engines in turn; starts after the first wait for `may_restart`, and an exception is raised."""

    def __init__(self, *engines: ScriptedGenerator | Exception) -> None:
        self.remaining = list(engines)
        self.may_restart = asyncio.Event()
        self.starts = 0
        self.recovered = asyncio.Event()
        self.recoveries_s: list[float] = []

    async def start(self) -> ScriptedGenerator:
        self.starts += 1
        if self.starts > 1:
            await self.may_restart.wait()
        engine = self.remaining.pop(0)
        if isinstance(engine, Exception):
            raise engine
        return engine

    def record_restart(self, recovery_s: float) -> None:
        self.recoveries_s.append(recovery_s)
        self.recovered.set()

    @asynccontextmanager
    async def supervised(self, policy: RestartPolicy | None = None) -> AsyncIterator[SupervisedGenerator]:
        policy = policy or RestartPolicy(check_interval_s=0.01, stable_after_s=0)
        generator = await SupervisedGenerator.create(self.start, restart_policy=policy, on_restart=self.record_restart)
        async with asyncio.timeout(TIMEOUT_S):
            try:
                yield generator
            finally:
                await generator.close()


def scripted(*texts: str, slow: dict[int, float] | None = None, word_delay_s: float = 0) -> ScriptedGenerator:
    return ScriptedGenerator(texts, delays_s=slow, word_delay_s=word_delay_s)


NEVER = 3600.0
"""Seconds that an engine samples a candidate that never finishes."""


def start_request(
    generator: SupervisedGenerator,
    best_of: int = 3,
    observer: RunObserver | None = None,
    deadline_s: float | None = None,
) -> "asyncio.Task[BestOfNResult]":
    served = BestOfN(generator, {"scripted-reward": ScriptedScorer()})
    request = BestOfNRequest(Prompt(text="Well?"), SamplingParams(seed=5), best_of, deadline_s=deadline_s)
    return asyncio.create_task(served.run(request, observer))


async def until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(0)


async def until_running(engine: ScriptedGenerator, requests: int = 1) -> None:
    """Returns when that many requests have reached the engine and their candidates are being sampled."""
    await until(lambda: len(engine.running) >= requests)


async def until_unavailable(generator: SupervisedGenerator) -> str:
    """Waits until the death has been noticed; returns the message of the error that `engine` then raises."""
    while True:
        try:
            _ = generator.engine
        except NotReadyError as error:
            return error.message
        await asyncio.sleep(0.001)


async def test_an_idle_engine_that_dies_is_replaced_and_requests_are_refused_until_then() -> None:
    first, second = scripted("a"), scripted("b")
    engines = Engines(first, second)
    async with engines.supervised() as generator:
        await generator.check_ready()
        first.die()
        message = await until_unavailable(generator)
        assert message == "The engine has died and is starting again; try again in a few seconds."
        with pytest.raises(NotReadyError):
            await start_request(generator)
        engines.may_restart.set()
        await engines.recovered.wait()
        await generator.check_ready()
        assert generator.engine is second
        assert (await start_request(generator)).selection.winner.candidate.text == "b"
    assert first.closed
    assert second.closed
    assert len(engines.recoveries_s) == 1


async def test_twenty_running_requests_are_answered_by_the_next_engine() -> None:
    first, second = scripted("old", slow=dict.fromkeys(range(3), NEVER)), scripted("new")
    engines = Engines(first, second)
    engines.may_restart.set()
    async with engines.supervised() as generator:
        requests = [start_request(generator) for _ in range(20)]
        await until_running(first, 20)
        first.die()
        results = await asyncio.gather(*requests)
    assert {result.selection.winner.candidate.text for result in results} == {"new"}
    assert {(result.completed, result.failed, result.cancelled) for result in results} == {(3, 0, 0)}


async def test_finished_candidates_are_kept_and_the_others_keep_their_seeds() -> None:
    first = scripted("kept", "lost", "kept too", slow={1: NEVER})
    second = scripted("unwanted", "drawn again", "unwanted", slow={0: NEVER, 2: NEVER})
    engines = Engines(first, second)
    engines.may_restart.set()
    observer = RecordingObserver(streams_partial=True)
    async with engines.supervised() as generator:
        request = start_request(generator, observer=observer)
        await until(lambda: len(observer.outcomes) == 2)
        first.die()
        result = await request
    texts = {ranked.candidate.index: ranked.candidate.text for ranked in result.selection.ranking}
    assert texts == {0: "kept", 1: "drawn again", 2: "kept too"}
    assert sorted(outcome.index for outcome in observer.outcomes) == [0, 1, 2]
    assert second.cancelled == [0, 2], "candidates that had already finished"
    assert second.calls == first.calls == [(Prompt(text="Well?"), SamplingParams(seed=5), 3)]


async def test_a_request_is_sampled_again_only_once() -> None:
    first, second, third = (scripted("a", slow=dict.fromkeys(range(3), NEVER)) for _ in range(3))
    engines = Engines(first, second, third)
    engines.may_restart.set()
    async with engines.supervised() as generator:
        request = start_request(generator)
        await until_running(first)
        first.die()
        await until_running(second)
        second.die()
        with pytest.raises(EngineDiedError):
            await request
    assert third.calls == []


async def test_a_request_with_streamed_partial_text_is_not_sampled_again() -> None:
    first, second = scripted("one two three", word_delay_s=NEVER), scripted("other words")
    engines = Engines(first, second)
    engines.may_restart.set()
    observer = RecordingObserver(streams_partial=True)
    async with engines.supervised() as generator:
        request = start_request(generator, best_of=1, observer=observer)
        await until(lambda: bool(observer.outcomes))
        first.die()
        with pytest.raises(EngineDiedError):
            await request
    assert [outcome.text for outcome in observer.outcomes if isinstance(outcome, Candidate)] == ["one"]
    assert second.calls == []


async def test_a_deadline_ends_the_wait_for_the_next_engine() -> None:
    first = scripted("early", "late", slow={1: NEVER})
    unfinished = scripted("late", slow={0: NEVER})
    observer = RecordingObserver(streams_partial=True)
    async with Engines(first, scripted("b")).supervised() as generator:
        request = start_request(generator, best_of=2, observer=observer, deadline_s=0.5)
        await until(lambda: bool(observer.outcomes))
        first.die()
        result = await request
    assert (result.selection.winner.candidate.text, result.stopped_by, result.cancelled) == ("early", "deadline", 1)
    async with Engines(unfinished, scripted("b")).supervised() as generator:
        request = start_request(generator, best_of=1, deadline_s=0.2)
        await until_running(unfinished)
        unfinished.die()
        with pytest.raises(DeadlineError):
            await request


async def test_a_request_that_is_cancelled_while_it_waits_is_not_sampled_again() -> None:
    first, second = scripted("a", slow=dict.fromkeys(range(3), NEVER)), scripted("b")
    engines = Engines(first, second)
    async with engines.supervised() as generator:
        request = start_request(generator)
        await until_running(first)
        first.die()
        await until_unavailable(generator)
        request.cancel()
        engines.may_restart.set()
        await engines.recovered.wait()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert second.calls == []


async def test_a_failed_start_is_reported_and_repeated() -> None:
    first, third = scripted("a", slow=dict.fromkeys(range(3), NEVER)), scripted("c")
    engines = Engines(first, NotReadyError("The disk is full; make room."), RuntimeError("hunter2"), third)
    engines.may_restart.set()
    message = "The engine has died and could not be started again. The disk is full; make room."
    policy = RestartPolicy(check_interval_s=0.01, stable_after_s=0, first_wait_s=0.05)
    async with engines.supervised(policy) as generator:
        request = start_request(generator)
        await until_running(first)
        first.die()
        with pytest.raises(NotReadyError, match=message):
            await request
        await engines.recovered.wait()
        assert engines.starts == 4
        assert (await start_request(generator)).selection.winner.candidate.text == "c"


async def test_requests_do_not_wait_while_engines_die_one_after_another() -> None:
    first, second = scripted("a"), scripted("b", slow=dict.fromkeys(range(3), NEVER))
    engines = Engines(first, second, scripted("c"))
    engines.may_restart.set()
    policy = RestartPolicy(check_interval_s=0.01, stable_after_s=NEVER, first_wait_s=NEVER)
    async with engines.supervised(policy) as generator:
        first.die()
        await engines.recovered.wait()
        request = start_request(generator)
        await until_running(second)
        second.die()
        with pytest.raises(NotReadyError, match="after 2 failures in a row, is in at most 60 s"):
            await request
        with pytest.raises(NotReadyError, match="die one after another"):
            await generator.check_ready()
    assert engines.starts == 2


async def test_closing_cancels_a_running_start() -> None:
    first = scripted("a", slow=dict.fromkeys(range(3), NEVER))
    engines = Engines(first, scripted("b"))
    async with engines.supervised() as generator:
        request = start_request(generator)
        await until_running(first)
        first.die()
        await until_unavailable(generator)
        await generator.close()
        with pytest.raises(NotReadyError, match="stopping"):
            await request
    assert engines.starts == 2
    assert len(engines.remaining) == 1


async def test_an_error_of_the_first_start_is_raised_to_the_caller() -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        await SupervisedGenerator.create(Engines(RuntimeError("no such model")).start)


@pytest.mark.parametrize(("failures", "wait_s"), [(1, 0), (2, 2), (3, 4), (4, 8), (6, 32), (7, 60), (1_000_000, 60)])
def test_the_wait_doubles_from_the_second_failure_in_a_row(failures: int, wait_s: float) -> None:
    assert RestartPolicy().wait_s(failures) == wait_s


async def test_over_http_ready_is_503_and_health_is_200_until_the_next_engine() -> None:
    first = scripted("a", slow=dict.fromkeys(range(4), NEVER))
    engines, metrics = Engines(first, scripted("b")), Metrics()
    async with engines.supervised() as generator:
        app = app_over(BestOfN(generator, {"scripted-reward": ScriptedScorer()}), metrics)
        async with client_of(app) as client:
            during_death = asyncio.create_task(client.post("/v1/chat/completions", json=HELLO))
            await until_running(first)
            first.die()
            await until_unavailable(generator)
            for reply in [await client.get("/ready"), await client.post("/v1/chat/completions", json=HELLO)]:
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
                assert reply.headers["Retry-After"] == "5"
            assert (await client.get("/health")).status_code == 200
            engines.may_restart.set()
            answer = await during_death
            assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "b")
            assert (await client.get("/ready")).status_code == 200
    assert metrics.registry.get_sample_value("nbest_candidates_in_flight") == 0
