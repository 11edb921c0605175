"""The work of a client that has hung up is cancelled, down to the candidates in the engine."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import NotReadyError

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up before its answer was complete."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and has ended, when the client hangs up first.

    The body must have been read, so that `receive` has nothing else to say.

    Raises:
        ClientGoneError: there is no one left to answer.
        NotReadyError: the server ends, and has waited for this request as long as it was going to.
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
