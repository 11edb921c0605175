"""What is noted about one HTTP request on its way: its id, what becomes of it, and what it costs.

The outermost middleware opens the record. Whatever works for the request finds it by `current`, a context variable,
which asyncio hands on to tasks and `asyncio.to_thread` to threads. Log lines take the id from it, and the line that
ends the request takes the rest. No text of a request or an answer is ever in it.
"""

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""What is taken over from a client: no spaces, quotes or line ends, so that no client can write lines of its own."""

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines; they are counted, but neither traced nor logged beside the requests of users."""

UNKNOWN_ENDPOINT = "unknown"
"""Where a request goes that no route takes."""


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Tokens of an answered request: of its prompt, of all its candidates, and those the scorer read."""

    prompt: int = 0
    generated: int = 0
    scored: int = 0


@dataclass(slots=True)
class RequestRecord:
    """One request; `endpoint` is its route, never the raw path, and known when it has been routed."""

    request_id: str
    method: str
    endpoint: str = UNKNOWN_ENDPOINT
    status: int = 500
    tokens: TokenCost | None = None
    trace_id: str | None = None


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def open_record(method: str, asked_id: str | None) -> RequestRecord:
    """The record of the request that begins in this task; an id that cannot be used is replaced by a new one.

    It stays in the task's context, as what is logged after the reply, such as the traceback of a fault, belongs to it.
    """
    usable = asked_id is not None and REQUEST_ID.fullmatch(asked_id)
    record = RequestRecord(asked_id if asked_id and usable else f"req_{uuid.uuid4().hex}", method)
    _current.set(record)
    return record


def current() -> RequestRecord | None:
    """The record of the request that this is done for; None outside of requests."""
    return _current.get()


def note_tokens(cost: TokenCost) -> None:
    """The request has been answered at this cost."""
    if (record := current()) is not None:
        record.tokens = cost
