"""Calls of another server that takes and returns JSON, with every failure as a `ScoringError`."""

from collections.abc import Mapping
from typing import Any

import httpx

from reranker.scorers.base import ScoringError, UnscorableCandidatesError, UnscorableError

TIMEOUT = httpx.Timeout(120, connect=5)
"""Seconds. A running server accepts connections at once; a full batch of long texts may wait behind others."""
REFUSALS = (400, 413, 422)
"""Statuses with which a server refuses the content of a request, so that sending it again cannot succeed."""
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading a reply of an unexpected form can raise."""
MAX_QUOTED_CHARACTERS = 200
"""Longest quotation of a reply that is not an error in OpenAI's or FastAPI's form."""


async def post(client: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> Any:
    """The JSON of the reply.

    Raises:
        ScoringError: the server does not answer, fails, or does not send JSON; the message quotes it.
        UnscorableError: the server refuses the content, or it is no valid Unicode.
    """
    try:
        reply = await client.post(url, json=body)
    except UnicodeEncodeError as error:
        raise UnscorableCandidatesError(f"a text cannot be sent to {url}: {error.reason}") from error
    except httpx.HTTPError as error:
        raise ScoringError(f"{url} does not answer: {text_of(error)}") from error
    if not reply.is_success:
        raise (UnscorableError if reply.status_code in REFUSALS else ScoringError)(f"{url} replied: {refusal(reply)}")
    try:
        return reply.json()
    except UNREADABLE as error:
        raise ScoringError(f"{url} did not send JSON: {text_of(error)}") from error


def refusal(reply: httpx.Response) -> str:
    """The message in OpenAI's or FastAPI's error envelope, or the start of the body if it has neither form."""
    try:
        fields = reply.json()
        message = fields["error"]["message"] if "error" in fields else fields["detail"]
    except UNREADABLE:
        message = reply.text[:MAX_QUOTED_CHARACTERS]
    return f"{message} (status {reply.status_code})"


def tokens_used(fields: Any, *names: str) -> int:
    """The sum of these counts in a reply's `usage`; a count that is not there is 0."""
    usage = fields.get("usage") if isinstance(fields, dict) else None
    counts = [usage.get(name) for name in names] if isinstance(usage, dict) else []
    return sum(count for count in counts if type(count) is int and count > 0)


def text_of(error: Exception) -> str:
    """The message of an error, or its type if it has none."""
    return str(error) or type(error).__name__
