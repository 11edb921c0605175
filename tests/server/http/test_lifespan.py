"""The engine starts and stops with the server: HTTP answers before it is ready, and reports a failed start."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from server.app import create_app
from server.config import Settings
from server.errors import NotReadyError
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator
from tests.support.serving import HELLO, address_of, app_over, pipeline

CHAT = "/v1/chat/completions"


class ScriptedEngine:
    """An engine whose start waits for `finish_start` and then fails or succeeds.

    `events` records what happened; `reported_failures` are the errors that `on_start_failure` was called with.
    """

    def __init__(self, failure: Exception | None = None) -> None:
        self._may_finish = asyncio.Event()
        self.failure = failure
        self.events: list[str] = []
        self.reported_failures: list[BaseException] = []

    @asynccontextmanager
    async def start(self) -> AsyncIterator[BestOfN]:
        try:
            await self._may_finish.wait()
            if self.failure is not None:
                raise self.failure
            self.events.append("started")
            yield pipeline(ScriptedGenerator(["word"]))
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise
        finally:
            self.events.append("closed")

    @asynccontextmanager
    async def served(self) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(self.start, Settings(), Metrics(), on_start_failure=self.reported_failures.append)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://nbest") as client,
        ):
            yield client

    async def finish_start(self) -> None:
        self._may_finish.set()
        await asyncio.sleep(0.01)


async def test_while_the_engine_starts_only_health_is_200() -> None:
    engine = ScriptedEngine()
    async with engine.served() as client:
        assert (await client.get("/health")).status_code == 200
        for reply in [await client.post(CHAT, json=HELLO), await client.get("/ready"), await client.get("/v1/models")]:
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (503, "not_ready")
            assert error["message"] == "The engine is starting; try again in a few seconds."
            assert reply.headers["Retry-After"] == "5"
        await engine.finish_start()
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(CHAT, json=HELLO)).status_code == 200


async def test_an_invalid_request_is_400_even_while_the_engine_starts() -> None:
    async with ScriptedEngine().served() as client:
        assert (await client.post(CHAT, json=HELLO | {"best_of": 0})).status_code == 400


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (NotReadyError("No such model; prepare it."), "The engine failed to start. No such model; prepare it."),
        (RuntimeError("hunter2"), "The engine failed to start. The reason is in the server's log."),
    ],
)
async def test_a_failed_start_is_the_reply_to_requests_and_is_passed_to_on_start_failure(
    failure: Exception, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(failure)
    async with engine.served() as client:
        await engine.finish_start()
        for reply in [await client.get("/ready"), await client.post(CHAT, json=HELLO)]:
            assert (reply.status_code, reply.json()["error"]["message"]) == (503, message)
        assert (await client.get("/health")).status_code == 200
    assert engine.reported_failures == [failure]
    assert not caplog.records, "logging it is left to on_start_failure"


async def test_shutdown_closes_the_engine() -> None:
    engine = ScriptedEngine()
    async with engine.served():
        await engine.finish_start()
    assert engine.events == ["started", "closed"]


async def test_shutdown_cancels_a_start_that_has_not_finished() -> None:
    engine = ScriptedEngine()
    async with engine.served():
        await asyncio.sleep(0.01)
    assert engine.events == ["cancelled", "closed"]
    assert engine.reported_failures == []


async def test_a_request_that_outlasts_the_shutdown_is_503_with_a_retry_after() -> None:
    generator = ScriptedGenerator(["never"], delays_s=dict.fromkeys(range(4), 60))
    async with httpx.AsyncClient() as client:
        async with address_of(app_over(pipeline(generator)), shutdown_grace_s=1) as address:
            request = asyncio.create_task(client.post(f"{address}/v1/chat/completions", json=HELLO))
            await asyncio.sleep(0.3)  # until the request is in flight; otherwise the stopping server would refuse it
        reply = await request
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "not_ready"
    assert reply.headers["retry-after"]
    assert sorted(generator.cancelled) == [0, 1, 2, 3]
