"""Turns every error into OpenAI's error envelope, with the status from `server.errors` and its headers."""

import math
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server.errors import (
    AuthenticationError,
    ClientTimeoutError,
    NbestError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    http_status,
)
from server.observability.metrics import Metrics
from server.schemas.responses import ErrorBody, ErrorReply

NOT_READY_RETRY_AFTER_S = 5
"""An engine takes tens of seconds to start, so a client that retries every 5 s loses little time and costs little."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected; it appears in the metrics and the log only."""
UNEXPECTED = "The server failed while answering; the reason is in its log."
"""The message of an unexpected error, whose own message may contain internals."""


def error_reply(error: NbestError) -> ErrorReply:
    """The error in OpenAI's envelope."""
    return ErrorReply(error=ErrorBody(message=error.message, type=error.type, param=error.param, code=error.code))


def not_served(method: str, path: str) -> NotFoundError:
    """The error for a path, or a method of a path, that is not served."""
    return NotFoundError(f"{method} {path} is not served here; /openapi.json lists what is.")


def json_response(reply: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The reply as JSON, with only the fields that were set."""
    return Response(reply.model_dump_json(exclude_unset=True), status, headers, media_type="application/json")


class ErrorReplies:
    """The app's exception handler: replies in OpenAI's envelope, and counts requests that were refused with 429."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def __call__(self, request: Request, error: Exception) -> Response:
        if isinstance(error, NbestError):
            return self.refusal(error)
        if isinstance(error, HTTPException):  # from the router: an unknown path, or a method the path does not allow
            reply = error_reply(not_served(request.method, request.url.path))
            return json_response(reply, error.status_code, error.headers)
        # Starlette raises the error again after the reply, so uvicorn logs it with its traceback.
        return json_response(error_reply(NbestError(UNEXPECTED)), HTTPStatus.INTERNAL_SERVER_ERROR)

    def refusal(self, error: NbestError) -> Response:
        """The reply to a request that ended with this error."""
        headers = dict[str, str]()
        match error:
            case OverloadedError():
                headers["Retry-After"] = f"{math.ceil(error.retry_after_s)}"
                self._metrics.observe_shed(error.reason)
            case NotReadyError():
                headers["Retry-After"] = f"{NOT_READY_RETRY_AFTER_S}"
            case AuthenticationError():
                headers["WWW-Authenticate"] = "Bearer"
            case ClientTimeoutError():
                headers["Connection"] = "close"  # otherwise the server would wait for the rest of the body
            case _:
                pass
        return json_response(error_reply(error), http_status(error), headers)


async def on_client_gone(_: Request, __: Exception) -> Response:
    """A reply that nobody receives; it gives the metrics and the log a status."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)
