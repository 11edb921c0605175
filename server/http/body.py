"""The body of a request, read within bounds.

It is bounded while it arrives, so that a large one is refused before it fills the memory.
"""

from collections.abc import AsyncIterator, Mapping

from server.errors import BadRequestError, TooLargeError


async def read_body(chunks: AsyncIterator[bytes], headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        TooLargeError: it is over `max_bytes`, by its Content-Length or as it arrives.
        BadRequestError: it is declared to be something other than JSON.
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
