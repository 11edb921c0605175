"""HTTP is up before the engine, and says so; a start that fails is told; the engine is closed with the server."""

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


class Engine:
    """A start that waits for the test's word, then fails or serves; `events` tells what became of it."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.go = asyncio.Event()
        self.failure = failure
        self.events: list[str] = []
        self.heard: list[BaseException] = []

    @asynccontextmanager
    async def start(self) -> AsyncIterator[BestOfN]:
        try:
            await self.go.wait()
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
        app = create_app(self.start, Settings(), Metrics(), on_start_failure=self.heard.append)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://nbest") as client,
        ):
            yield client

    async def started(self) -> None:
        self.go.set()
        await asyncio.sleep(0.01)


async def test_while_the_engine_starts_only_health_is_well() -> None:
    engine = Engine()
    async with engine.served() as client:
        assert (await client.get("/health")).status_code == 200
        for reply in [await client.post(CHAT, json=HELLO), await client.get("/ready"), await client.get("/v1/models")]:
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (503, "not_ready")
            assert error["message"] == "The engine is starting; try again in a few seconds."
            assert reply.headers["Retry-After"] == "5"
        await engine.started()
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(CHAT, json=HELLO)).status_code == 200


async def test_a_bad_request_is_told_even_while_the_engine_starts() -> None:
    async with Engine().served() as client:
        assert (await client.post(CHAT, json=HELLO | {"best_of": 0})).status_code == 400


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (NotReadyError("No such model; prepare it."), "The engine failed to start. No such model; prepare it."),
        (RuntimeError("hunter2"), "The engine failed to start. The reason is in the server's log."),
    ],
)
async def test_a_failed_start_is_told_and_heard(
    failure: Exception, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(failure)
    async with engine.served() as client:
        await engine.started()
        for reply in [await client.get("/ready"), await client.post(CHAT, json=HELLO)]:
            assert (reply.status_code, reply.json()["error"]["message"]) == (503, told)
        assert (await client.get("/health")).status_code == 200
    assert engine.heard == [failure]
    assert not caplog.records, "it is logged by whoever hears of it"


async def test_shutdown_closes_the_engine() -> None:
    engine = Engine()
    async with engine.served():
        await engine.started()
    assert engine.events == ["started", "closed"]


async def test_shutdown_gives_up_a_start_under_way() -> None:
    engine = Engine()
    async with engine.served():
        await asyncio.sleep(0.01)
    assert engine.events == ["cancelled", "closed"]
    assert engine.heard == []


async def test_a_request_that_outlasts_the_shutdown_is_told_to_come_back() -> None:
    generator = ScriptedGenerator(["never"], delays_s=dict.fromkeys(range(4), 60))
    async with httpx.AsyncClient() as client:
        async with address_of(app_over(pipeline(generator)), shutdown_grace_s=1) as address:
            asking = asyncio.create_task(client.post(f"{address}/v1/chat/completions", json=HELLO))
            await asyncio.sleep(0.3)  # under way; had it not begun, it would be refused instead of asked to come back
        reply = await asking
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "not_ready"
    assert reply.headers["retry-after"]
    assert sorted(generator.cancelled) == [0, 1, 2, 3]
