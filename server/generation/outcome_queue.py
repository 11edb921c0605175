"""A queue of one generation's outcomes in the order they happen; every generator yields its candidates through it."""

import asyncio
from collections.abc import AsyncIterator

from reranker.candidate import FailedCandidate
from server.generation.base import Outcome


class OutcomeQueue:
    """An async iterable of lists of outcomes; it ends when none of the N candidates is `expected` any more."""

    def __init__(self, n: int) -> None:
        self.expected = set(range(n))
        self._queue: list[Outcome] = []
        self._changed = asyncio.Event()
        self._error: BaseException | None = None

    def put(self, outcome: Outcome) -> None:
        """Queues an outcome; ignores it if its candidate has ended or was dropped."""
        if outcome.index not in self.expected:
            return
        if isinstance(outcome, FailedCandidate) or outcome.finish_reason:
            self.expected.discard(outcome.index)
        self._queue.append(outcome)
        self._changed.set()

    def drop(self, index: int) -> bool:
        """Removes a candidate and its queued outcomes; returns whether it was still running."""
        was_expected = index in self.expected
        self.expected.discard(index)
        self._queue = [outcome for outcome in self._queue if outcome.index != index]
        self._changed.set()
        return was_expected

    def fail(self, error: BaseException) -> None:
        """Ends the iteration with an error of the whole request."""
        self._error = error
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        while self.expected or self._queue:
            await self._changed.wait()
            self._changed.clear()
            if self._error is not None:
                raise self._error
            outcomes, self._queue = self._queue, []
            if outcomes:
                yield outcomes
