"""Measures the time in which at least one scorer call was running; calls may overlap."""

import time
from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores


class TimedScorer:
    """Wraps a scorer; `busy.seconds` is the time in which at least one call of it was running."""

    def __init__(self, scorer: Scorer) -> None:
        self.name = scorer.name
        self.needs: Needs = scorer.needs
        self.busy = OverlapTimer()
        self._scorer = scorer

    async def check(self, prompt: Prompt) -> None:
        await self._scorer.check(prompt)

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        with self.busy:
            return await self._scorer.score(prompt, candidates)

    async def close(self) -> None:
        await self._scorer.close()


class OverlapTimer:
    """`seconds` is the time in which at least one `with` block of this timer was running, on one event loop."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = 0
        self._since_s = 0.0

    def __enter__(self) -> None:
        if not self._running:
            self._since_s = time.perf_counter()
        self._running += 1

    def __exit__(self, *_: object) -> None:
        self._running -= 1
        if not self._running:
            self.seconds += time.perf_counter() - self._since_s
