"""How long scorers are at it, where their calls overlap.

A scorer that tells how long it was at it.
"""

import time
from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores


class TimedScorer:
    """The same scorer; `busy` has the seconds in which at least one call was out."""

    def __init__(self, scorer: Scorer) -> None:
        self.name = scorer.name
        self.needs: Needs = scorer.needs
        self.busy = OverlapTimer()
        self._scorer = scorer

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        with self.busy:
            return await self._scorer.score(prompt, candidates)

    async def close(self) -> None:
        await self._scorer.close()


class OverlapTimer:
    """`seconds` in which at least one block `with` it was being run, on one event loop."""

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
