"""Every error a client can meet.

    NbestError
    ├── BadRequestError             400  the request cannot be honoured; `param` names the field
    │   └── ContextLengthError      400  code context_length_exceeded
    ├── AuthenticationError         401  no key, or none that is known here
    ├── ForbiddenError              403  the key may not do this
    ├── NotFoundError               404  no such model or path
    ├── ClientTimeoutError          408  the body did not arrive in time
    ├── TooLargeError               413  the body is over the limit
    ├── OverloadedError             429  shed; Retry-After says when to come back
    │   └── RateLimitError          429  the key's budget is spent
    ├── HeadersTooLargeError        431  the headers are over the limit
    ├── NotReadyError               503  starting, draining, or the engine died; worth a retry
    │   ├── EngineDiedError         503  the engine died under the request
    │   ├── GenerationError         503  no candidate survived
    │   └── RewardError             503  the reward model failed and the request asked for no fallback
    └── DeadlineError               504  the deadline passed with nothing finished

The message is a sentence that says what to do. `STATUS` below is the one table from error to HTTP status.
"""

import copyreg
from typing import Any, Literal


class NbestError(Exception):
    """An error with a message meant for the client."""

    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes the fields travel, whatever the constructor of the kind asks for."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class BadRequestError(NbestError):
    """The request cannot be honoured as it stands."""

    type = "invalid_request_error"


class ContextLengthError(BadRequestError):
    """The prompt leaves no room in the model's context."""

    code = "context_length_exceeded"


class AuthenticationError(NbestError):
    """No key was sent, or none that is known here."""

    type = "invalid_request_error"
    code = "invalid_api_key"


class ForbiddenError(NbestError):
    """The key is known and may not do this."""

    type = "invalid_request_error"
    code = "forbidden"


class NotFoundError(NbestError):
    """The model or path does not exist here."""

    type = "invalid_request_error"
    code = "not_found"


class ClientTimeoutError(NbestError):
    """The client took too long to send its body."""

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
    """Shed because too much is in flight."""

    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float, reason: ShedReason = "generator") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class RateLimitError(OverloadedError):
    """The budget of the key is spent for now; the type is its unit, as OpenAI has it."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, unit: Literal["requests", "tokens"]) -> None:
        reason: ShedReason = "requests_budget" if unit == "requests" else "tokens_budget"
        super().__init__(message, retry_after_s=retry_after_s, reason=reason)
        self.type = unit


class NotReadyError(NbestError):
    """Starting, draining, or broken; worth a retry."""

    type = "service_unavailable"
    code = "not_ready"


class EngineDiedError(NotReadyError):
    """The engine died while it was answering."""


class GenerationError(NotReadyError):
    """No candidate survived."""

    code = "generation_failed"


class RewardError(NotReadyError):
    """The reward model failed and the request asked for no fallback."""

    code = "reward_failed"


class DeadlineError(NbestError):
    """The deadline passed with nothing finished."""

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
    """The status of the nearest ancestor in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
