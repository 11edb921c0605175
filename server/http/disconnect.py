"""Cancels the work of a client that disconnects, down to its candidates in the engine."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import NotReadyError

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client disconnected before its answer was complete."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client disconnects first, `work` is cancelled, and awaited until it has ended.

    The body must have been read before, so that a disconnect is the only message that `receive` can still return.

    Raises:
        ClientGoneError: the client disconnected.
        NotReadyError: the server is stopping, and the time it allows for requests in flight is over.
    """
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    except asyncio.CancelledError:
        raise NotReadyError("The server stopped before the answer was complete; try again.") from None
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
