"""What happens to a request as a connection, whichever route it takes: it is recorded, and it may be cut.

A client that has hung up wants nothing any more: its work is cancelled, down to the candidates in the engine. All of
this is plain ASGI, so that streams pass through untouched.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from server.errors import NotReadyError
from server.logs import log_access
from server.metrics import Metrics
from server.request_record import UNKNOWN_ENDPOINT, open_record

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClientGoneError(Exception):
    """The client hung up before its answer was complete."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and has ended, when the client hangs up first.

    The body must have been read, so that `receive` has nothing else to say.

    Raises:
        ClientGoneError: there is no one left to answer.
        NotReadyError: the server ends, and has waited for this request as long as it was going to.
    """
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    except asyncio.CancelledError:
        raise NotReadyError("The server stopped before the answer was complete; try again.") from None
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class RequestRecorder:
    """Middleware, the outermost: gives every request its record and its reply the id, counts it, and logs its end."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        record = open_record(scope["method"], header(scope, b"x-request-id"))

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            record.endpoint = endpoint_of(scope)
            self._metrics.observe_request(record.endpoint, record.status)
            log_access(record, time.perf_counter() - started_s)


def endpoint_of(scope: Scope) -> str:
    """The route that took the request, never a raw path: clients can neither add series nor have their words logged."""
    route = scope.get("route")
    return route.path if route else UNKNOWN_ENDPOINT


def header(scope: Scope, name: bytes) -> str | None:
    """The request's first header of that name, which is in small letters."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
