"""The outermost middleware: gives each request its record and id, counts it, and writes its line of the access log.

It is plain ASGI, so that streams pass through unchanged.
"""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observability.logs import log_access
from server.observability.metrics import Metrics
from server.observability.request_context import UNKNOWN_ENDPOINT, open_record


class RequestRecorder:
    """Opens the record of each request, sends its id with the reply, and at the end counts and logs the request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        record = open_record(scope["method"], header(scope, b"x-request-id"))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            record.endpoint = endpoint_of(scope)
            self._metrics.observe_request(record.endpoint, record.status)
            log_access(record, time.perf_counter() - started_s)


def endpoint_of(scope: Scope) -> str:
    """The route of the request, never its raw path, so clients can neither add metric series nor write into the log."""
    route = scope.get("route")
    return route.path if route else UNKNOWN_ENDPOINT


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that name, which must be in lower case."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def without_request_id(app: ASGIApp) -> ASGIApp:
    """The app without the id in its replies, for Ray Serve: its proxy sends an id of its own with each reply."""

    async def app_without_id(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await app(scope, receive, send_without_id)

    return app_without_id
