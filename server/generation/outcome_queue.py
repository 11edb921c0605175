"""The outcomes of one generation, in the order they happen; every generator hands its candidates on through this."""

import asyncio
from collections.abc import AsyncIterator

from reranker.candidate import FailedCandidate
from server.generation.base import Outcome


class OutcomeQueue:
    """A queue that knows which of its N candidates are still `expected`, and ends when none is."""

    def __init__(self, n: int) -> None:
        self.expected = set(range(n))
        self._queue: list[Outcome] = []
        self._news = asyncio.Event()
        self._error: BaseException | None = None

    def put(self, outcome: Outcome) -> None:
        """Hands on an outcome; one of a candidate that has ended or was dropped is ignored."""
        if outcome.index not in self.expected:
            return
        if isinstance(outcome, FailedCandidate) or outcome.finish_reason:
            self.expected.discard(outcome.index)
        self._queue.append(outcome)
        self._news.set()

    def drop(self, index: int) -> bool:
        """Expects this candidate no longer and forgets it; says whether it was still being generated."""
        was_expected = index in self.expected
        self.expected.discard(index)
        self._queue = [one for one in self._queue if one.index != index]
        self._news.set()
        return was_expected

    def fail(self, error: BaseException) -> None:
        """Ends the iteration with an error that concerns the whole request."""
        self._error = error
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        while self.expected or self._queue:
            await self._news.wait()
            self._news.clear()
            if self._error is not None:
                raise self._error
            outcomes, self._queue = self._queue, []
            if outcomes:
                yield outcomes
