"""Every failure becomes OpenAI's error envelope, with its status from `server.errors` and its headers."""

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
"""A start takes tens of seconds; a client that asks every five loses little and costs nothing."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that hung up: seen by the metrics and the log alone."""
UNEXPECTED = "The server failed while answering; the reason is in its log."


def error_reply(error: NbestError) -> ErrorReply:
    """The error in OpenAI's envelope."""
    return ErrorReply(error=ErrorBody(message=error.message, type=error.type, param=error.param, code=error.code))


def not_served(method: str, path: str) -> NotFoundError:
    """The refusal of a path or method."""
    return NotFoundError(f"{method} {path} is not served here; /openapi.json lists what is.")


def json_response(reply: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(reply.model_dump_json(exclude_unset=True), status, headers, media_type="application/json")


class ErrorReplies:
    """Turns whatever was raised into a reply in OpenAI's envelope, and counts what was shed."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def __call__(self, request: Request, error: Exception) -> Response:
        if isinstance(error, NbestError):
            return self.refusal(error)
        if isinstance(error, HTTPException):  # from the router: an unknown path, or a method that a path does not take
            told = error_reply(not_served(request.method, request.url.path))
            return json_response(told, error.status_code, error.headers)
        # Raised on after the reply, so that the server behind this app logs it.
        return json_response(error_reply(NbestError(UNEXPECTED)), HTTPStatus.INTERNAL_SERVER_ERROR)

    def refusal(self, error: NbestError) -> Response:
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
                headers["Connection"] = "close"  # else the rest of the body would be waited for
            case _:
                pass
        return json_response(error_reply(error), http_status(error), headers)


async def on_client_gone(_: Request, __: Exception) -> Response:
    """The reply to nobody, so that the metrics and the log have a status."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)
