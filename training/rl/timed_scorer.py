"""A scorer that tells how long it was at it."""

from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores
from reranker.scorers.busy import Busy


class TimedScorer:
    """The same scorer; `busy` has the seconds in which at least one call was out."""

    def __init__(self, scorer: Scorer) -> None:
        self.name = scorer.name
        self.needs: Needs = scorer.needs
        self.busy = Busy()
        self._scorer = scorer

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        with self.busy:
            return await self._scorer.score(prompt, candidates)

    async def close(self) -> None:
        await self._scorer.close()
