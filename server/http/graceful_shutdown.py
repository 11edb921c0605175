"""Graceful shutdown: finish the requests in flight, refuse new ones with 503, then stop uvicorn.

uvicorn on its own closes the port first and then waits for the requests in flight. During that wait clients and load
balancers get connection errors, and a readiness probe gets no answer. Here the port stays open during the wait:
`/ready` and new requests are answered with 503 and a Retry-After. A second signal ends the wait. The process exits with
code 0 after SIGTERM, and as interrupted after Ctrl-C.
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from types import FrameType

import uvicorn

CANCELLED_REPLIES_S = 1
"""Time for the error replies of requests that were not finished in time; uvicorn cancels these requests first."""

log = logging.getLogger("nbest")


class DrainingServer(uvicorn.Server):
    """Stops after a signal, when the requests in flight have ended or `drain_s` seconds have passed.

    `refuse` is called at the signal; from then on the app must accept no new requests.
    """

    def __init__(self, config: uvicorn.Config, *, drain_s: float, refuse: Callable[[], None]) -> None:
        super().__init__(config)
        config.timeout_graceful_shutdown = CANCELLED_REPLIES_S
        self._drain_s = drain_s
        self._refuse = refuse
        self._draining = False
        self._in_flight: set[asyncio.Task[None]] | None = None
        self._drain_until_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT:
            self._captured_signals.append(sig)  # uvicorn raises it again at the end; SIGTERM should give exit code 0
        if self.should_exit:
            self.force_exit = True
        elif self._draining:
            self.should_exit = True
        else:
            self._draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._draining and self._in_flight is None:
            self._refuse()
            self._in_flight = set(self.server_state.tasks)
            self._drain_until_s = asyncio.get_running_loop().time() + self._drain_s
            log.info("Stopping: waiting up to %g s for %d requests in flight.", self._drain_s, len(self._in_flight))
        if self._in_flight is not None:
            in_time = asyncio.get_running_loop().time() < self._drain_until_s
            self.should_exit |= not (in_time and any(not task.done() for task in self._in_flight))
        return await super().on_tick(counter)
