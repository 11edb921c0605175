"""The outermost middleware: every request gets its record, its id and a line in the access log, and is counted.

Plain ASGI, so that streams pass through untouched.
"""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observability.logs import log_access
from server.observability.metrics import Metrics
from server.observability.request_context import UNKNOWN_ENDPOINT, open_record


class RequestRecorder:
    """Middleware, the outermost: gives every request its record and its reply the id, counts it, and logs its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
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


def without_request_id(app: ASGIApp) -> ASGIApp:
    """The app without an id in its replies: Serve's proxy gives each request one, and tells it in the reply itself."""

    async def replying(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await app(scope, receive, sending)

    return replying
