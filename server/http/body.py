"""Reads the body of a request, with limits on its size and on the time it takes to arrive.

The size is checked chunk by chunk, so a large body never fills the memory.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.config import Settings
from server.errors import BadRequestError, ClientTimeoutError, TooLargeError
from server.http.disconnect import ClientGoneError
from server.schemas.strict import RequestModel, parse


class BodyReader:
    """Reads and validates bodies within the limits of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes = settings.max_body_bytes
        self._timeout_s = settings.client_timeout_s

    async def read(self, request: Request, model: type[RequestModel]) -> RequestModel:
        """The validated body.

        Raises:
            ClientTimeoutError: the body did not arrive in time.
            TooLargeError: the body is over the limit.
            BadRequestError: the body is not JSON, or not a request of this model.
            ClientGoneError: the client disconnected.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await read_body(request.stream(), request.headers, self._max_bytes)
        except TimeoutError:
            raise ClientTimeoutError(
                f"The body did not arrive within {self._timeout_s:g} s; send it faster, or shorten it."
            ) from None
        except ClientDisconnect:
            raise ClientGoneError from None
        return parse(body, model)


async def read_body(chunks: AsyncIterator[bytes], headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The whole body, unparsed.

    Raises:
        TooLargeError: the Content-Length or the received bytes exceed `max_bytes`.
        BadRequestError: the Content-Type is not JSON.
    """
    media_type = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise BadRequestError(f"The body is declared as {media_type[:80]}; send Content-Type: application/json.")
    too_large = TooLargeError(f"The body is over {max_bytes} bytes; send a shorter prompt or fewer candidates.")
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)
