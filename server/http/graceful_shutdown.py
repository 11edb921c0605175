"""The end of a server: what is under way is finished, what comes now is refused, and then uvicorn stops.

uvicorn closes the port first and waits afterwards, so that for as long as a request takes, clients and load balancers
would meet a refused connection, and a readiness probe nothing at all. Here the port stays open for that time: `/ready`
and new requests are answered with 503 and a Retry-After. A second signal ends the wait. After SIGTERM the process ends
with exit code 0, after Ctrl-C as interrupted.
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from types import FrameType

import uvicorn

FLUSH_S = 1
"""For the last words of requests that were not finished in time, which uvicorn cancels then."""

log = logging.getLogger("nbest")


class DrainingServer(uvicorn.Server):
    """Stops on a signal when the requests under way have ended, and after `drain_s` in any case.

    `refuse` is called at the signal; from then on the app must take no new work.
    """

    def __init__(self, config: uvicorn.Config, *, drain_s: float, refuse: Callable[[], None]) -> None:
        super().__init__(config)
        config.timeout_graceful_shutdown = FLUSH_S
        self._drain_s = drain_s
        self._refuse = refuse
        self._draining = False
        self._under_way: set[asyncio.Task[None]] | None = None
        self._until_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT:
            self._captured_signals.append(sig)  # raised again in the end; SIGTERM is an order, and was obeyed
        if self.should_exit:
            self.force_exit = True
        elif self._draining:
            self.should_exit = True
        else:
            self._draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._draining and self._under_way is None:
            self._refuse()
            self._under_way = set(self.server_state.tasks)
            self._until_s = asyncio.get_running_loop().time() + self._drain_s
            log.info("Stopping: %d requests under way may take %g s.", len(self._under_way), self._drain_s)
        if self._under_way is not None:
            in_time = asyncio.get_running_loop().time() < self._until_s
            self.should_exit |= not (in_time and any(not task.done() for task in self._under_way))
        return await super().on_tick(counter)
