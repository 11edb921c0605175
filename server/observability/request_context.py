"""The record of the current HTTP request: its id, route, status and cost in tokens.

The outermost middleware opens the record. All code that works for the request gets it by `current`, from a context
variable, which asyncio passes on to tasks and `asyncio.to_thread` to threads. Log lines take the id from it, and the
access log all the rest. It never contains text of a request or an answer.
"""

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""Ids that are accepted from a client: no spaces, quotes or line ends, so no client can forge log lines."""

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Paths that machines request every few seconds; they are counted, but not traced, and logged at level debug only."""

UNKNOWN_ENDPOINT = "unknown"
"""The endpoint of a request that matches no route."""


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Tokens of an answered request: of its prompt, of all its candidates, and the tokens that the scorer read."""

    prompt: int = 0
    generated: int = 0
    scored: int = 0


@dataclass(slots=True)
class RequestRecord:
    """One request; `endpoint` is its route, never the raw path, and is set after routing."""

    request_id: str
    method: str
    endpoint: str = UNKNOWN_ENDPOINT
    status: int = 500
    tokens: TokenCost | None = None
    trace_id: str | None = None


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def open_record(method: str, client_id: str | None) -> RequestRecord:
    """Opens the record of the request that begins in this task; a missing or unusable `client_id` is replaced.

    It is never closed, so that lines logged after the reply, such as the traceback of a bug, have the id too.
    """
    is_usable = client_id is not None and REQUEST_ID.fullmatch(client_id)
    record = RequestRecord(client_id if client_id and is_usable else f"req_{uuid.uuid4().hex}", method)
    _current.set(record)
    return record


def current() -> RequestRecord | None:
    """The record of the request that the running code works for; None outside of requests."""
    return _current.get()


def note_tokens(cost: TokenCost) -> None:
    """Stores the cost of the current request, which has been answered."""
    if (record := current()) is not None:
        record.tokens = cost
