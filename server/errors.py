"""All errors that a client can receive, with their HTTP status.

    NbestError                      500  an unexpected error
    ├── BadRequestError             400  the request is invalid; `param` names the field
    │   └── ContextLengthError      400  the prompt does not fit into the context
    ├── AuthenticationError         401  no API key, or an unknown key
    ├── ForbiddenError              403  the key lacks the rights
    ├── NotFoundError               404  no such model or path
    ├── ClientTimeoutError          408  the request did not arrive in time
    ├── TooLargeError               413  the body is over the limit
    ├── OverloadedError             429  too many requests in flight; Retry-After says when to retry
    │   └── RateLimitError          429  the budget of the key is used up
    ├── HeadersTooLargeError        431  the headers are over the limit
    ├── NotReadyError               503  starting, stopping, or the engine died; a retry may succeed
    │   ├── EngineDiedError         503  the engine died while it worked on the request
    │   ├── GenerationError         503  all candidates failed
    │   └── RewardError             503  the reward model failed and the request has no fallback
    └── DeadlineError               504  the deadline passed before a candidate finished

The message is a sentence that says what to do. `STATUS` maps the classes to the HTTP status.
"""

import copyreg
from typing import Any, Literal


class NbestError(Exception):
    """An error whose message is for the client."""

    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the attributes instead of constructor arguments, so that all subclasses can cross processes."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class BadRequestError(NbestError):
    """The request is invalid."""

    type = "invalid_request_error"


class ContextLengthError(BadRequestError):
    """The prompt does not fit into the model's context."""

    code = "context_length_exceeded"


class AuthenticationError(NbestError):
    """No API key was sent, or an unknown key."""

    type = "invalid_request_error"
    code = "invalid_api_key"


class ForbiddenError(NbestError):
    """The key is known and lacks the rights."""

    type = "invalid_request_error"
    code = "forbidden"


class NotFoundError(NbestError):
    """The model or path does not exist here."""

    type = "invalid_request_error"
    code = "not_found"


class ClientTimeoutError(NbestError):
    """The client took too long to send its headers or its body."""

    type = "timeout_error"
    code = "request_timeout"


class TooLargeError(NbestError):
    """The body is over the size limit."""

    type = "invalid_request_error"
    code = "request_too_large"


class HeadersTooLargeError(NbestError):
    """The headers are over the size limit."""

    type = "invalid_request_error"
    code = "headers_too_large"


ShedReason = Literal["queue", "connections", "requests_budget", "tokens_budget", "generator"]


class OverloadedError(NbestError):
    """Refused because too many requests are in flight; `retry_after_s` says when to retry."""

    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float, reason: ShedReason = "generator") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class RateLimitError(OverloadedError):
    """The budget of the key is used up for now; the type is the unit of the budget, as in OpenAI's API."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, unit: Literal["requests", "tokens"]) -> None:
        reason: ShedReason = "requests_budget" if unit == "requests" else "tokens_budget"
        super().__init__(message, retry_after_s=retry_after_s, reason=reason)
        self.type = unit


class NotReadyError(NbestError):
    """The server is starting, stopping, or its engine died; a retry may succeed."""

    type = "service_unavailable"
    code = "not_ready"


class EngineDiedError(NotReadyError):
    """The engine died while it worked on the request."""


class GenerationError(NotReadyError):
    """All candidates failed."""

    code = "generation_failed"


class RewardError(NotReadyError):
    """The reward model failed and the request has no fallback."""

    code = "reward_failed"


class DeadlineError(NbestError):
    """The deadline passed before a candidate finished."""

    type = "timeout_error"
    code = "deadline_exceeded"


STATUS: dict[type[NbestError], int] = {
    BadRequestError: 400,
    AuthenticationError: 401,
    ForbiddenError: 403,
    NotFoundError: 404,
    ClientTimeoutError: 408,
    TooLargeError: 413,
    OverloadedError: 429,
    HeadersTooLargeError: 431,
    NotReadyError: 503,
    DeadlineError: 504,
    NbestError: 500,
}


def http_status(error: NbestError) -> int:
    """The HTTP status of the error: that of its own class in `STATUS`, or of its nearest base class there."""
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)
