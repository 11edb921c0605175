"""The body of a request: bounded in bytes and time while it arrives, so that a large one never fills the memory."""

import asyncio
from collections.abc import AsyncIterator, Mapping

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.config import Settings
from server.errors import BadRequestError, ClientTimeoutError, TooLargeError
from server.http.disconnect import ClientGoneError
from server.schemas.strict import RequestModel, parse


class BodyReader:
    """Reads bodies within the limits of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes = settings.max_body_bytes
        self._timeout_s = settings.client_timeout_s

    async def read(self, request: Request, model: type[RequestModel]) -> RequestModel:
        """The validated body.

        Raises:
            ClientTimeoutError: it did not arrive in time.
            TooLargeError: it is over the limit.
            BadRequestError: it is not JSON, or not a request of this model.
            ClientGoneError: the client hung up.
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
    """The whole body.

    Raises:
        TooLargeError: it is over `max_bytes`, by its Content-Length or as it arrives.
        BadRequestError: its declared type is not JSON.
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
