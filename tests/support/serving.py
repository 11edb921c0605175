"""The HTTP app with scripted doubles, called in memory or through a real socket."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.config import Settings
from server.http.limits import bounded_protocol
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer

HELLO = {"model": "scripted", "messages": [{"role": "user", "content": "Hello?"}]}
"""The smallest chat request."""


def pipeline(generator: ScriptedGenerator, *scorers: ScriptedScorer) -> BestOfN:
    return BestOfN(generator, {scorer.name: scorer for scorer in scorers or (ScriptedScorer(),)})


def app_over(served: BestOfN, metrics: Metrics | None = None, **settings: Any) -> FastAPI:
    @asynccontextmanager
    async def start() -> AsyncIterator[BestOfN]:
        yield served

    return create_app(start, Settings(**settings), metrics or Metrics())


@asynccontextmanager
async def client_of(app: FastAPI, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client in memory that gets whole replies; waits until the app is ready, with `key` if /ready needs a key."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://nbest") as client,
    ):
        await until_ready(client, key)
        yield client


def client_over(
    generator: ScriptedGenerator, *scorers: ScriptedScorer
) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    return client_of(app_over(pipeline(generator, *scorers)))


@asynccontextmanager
async def address_of(
    app: FastAPI, *, shutdown_grace_s: int = 5, key: str | None = None, **settings: Any
) -> AsyncIterator[str]:
    """The address of a real server on a free port: replies are streamed, and clients can disconnect.

    `settings` are those that limit a connection.
    """
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:  # asyncio disables Nagle's algorithm only if TCP is named
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # so that a client that connects before the server starts waits for it
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                http=bounded_protocol(Settings(**settings)),
                timeout_graceful_shutdown=shutdown_grace_s,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=address) as client:
            await until_ready(client, key)
        yield address
        server.should_exit = True
        await serving


async def until_ready(client: httpx.AsyncClient, key: str | None = None) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for _ in range(1000):
        if (await client.get("/ready", headers=headers)).is_success:
            return
        await asyncio.sleep(0.001)
    raise TimeoutError("the pipeline did not become ready")
