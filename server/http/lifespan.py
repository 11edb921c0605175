"""Starts and stops the engine while the HTTP server is already answering.

An engine takes tens of seconds to start. Meanwhile the server answers health probes with 200 and all other requests
with 503. One background task both starts and closes the engine, because some of its resources must be closed by the
task that opened them. If the start fails, every later request is answered with the reason.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from server.errors import NbestError, NotReadyError
from server.pipeline.best_of_n import BestOfN

log = logging.getLogger("nbest")


class Lifecycle:
    """Starts the engine with the server, and stops it with the server.

    `on_start_failure` is called with the error of a failed start; without it the error is logged.
    """

    def __init__(
        self,
        start: Callable[[], AbstractAsyncContextManager[BestOfN]],
        on_start_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._start = start
        self._on_start_failure = on_start_failure
        self._pipeline: BestOfN | None = None
        self._failure: Exception | None = None
        self._draining = False
        self._stopping = asyncio.Event()

    @property
    def pipeline(self) -> BestOfN:
        """The running pipeline.

        Raises:
            NotReadyError: the engine is starting, is stopping, or failed to start; the message says which.
        """
        if self._pipeline is not None and not self._draining:
            return self._pipeline
        if self._failure is None:
            state = "stopping" if self._draining or self._stopping.is_set() else "starting"
            raise NotReadyError(f"The engine is {state}; try again in a few seconds.")
        reason = (
            self._failure.message if isinstance(self._failure, NbestError) else "The reason is in the server's log."
        )
        raise NotReadyError(f"The engine failed to start. {reason}")

    def drain(self) -> None:
        """Refuses new requests from now on; requests in flight keep the pipeline they have."""
        self._draining = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Starts the engine in the background; on leaving, closes it and waits for that."""
        engine = asyncio.create_task(self._run())
        try:
            yield
        finally:
            started = self._pipeline is not None
            self._pipeline = None
            self._stopping.set()
            if not started:
                engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with self._start() as pipeline:
                self._pipeline = pipeline
                await self._stopping.wait()
        except Exception as error:
            if self._stopping.is_set():
                log.exception("The engine did not stop cleanly.")
                return
            self._failure = error
            if self._on_start_failure is None:
                log.exception("The engine failed to start.")
            else:
                self._on_start_failure(error)
