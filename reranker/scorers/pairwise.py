"""Turns pairwise comparisons into rewards by a knockout tournament. SPEC `pairwise:judge:MODEL`.

Some judges compare two candidates more reliably than they grade one. N candidates need N − 1 matches in ⌈log₂ N⌉
rounds, and the matches of a round run concurrently:

    round 1    0–1   2–3   4        with an odd number the last candidate advances without a match (a bye)
    round 2    w–w   4
    round 3    w–4                  N = 5: 4 matches, 3 rounds

A match consists of two comparisons, one with each candidate shown first, because judges favour one of the two
positions. Its probability is the mean of both. A comparison without a verdict counts as undecided, 0.5. At 0.5 the
candidate with the lower index advances.

The reward of a candidate is the number of rounds that it won, byes included, plus its probability of being better in
the match that it lost. That is at most 0.5, so it only orders the candidates that lost in the same round. The winner's
reward is ⌈log₂ N⌉. A tournament finds its winner reliably and orders the others roughly, because a good candidate that
meets the best one early loses early. A candidate has no reward if none of its matches had a verdict, however far it
advanced.

These rewards are comparable only within one tournament. So the scorer needs all candidates of a request in one call,
and scoring begins when the last has finished.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, ReadsAnyPrompt, Scores, ScoringError

UNDECIDED = 0.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """The probability (0 to 1) that the first of two is better, NaN without a verdict, and the tokens spent on it."""

    probability: float
    num_tokens: int = 0


class Comparator(Protocol):
    """Decides which of two candidates is better; the order in which they are given may bias it."""

    async def __call__(self, prompt: Prompt, first: Candidate, second: Candidate) -> Comparison:
        """Compares the two in this order.

        Raises:
            ScoringError: there is no comparison; the message gives the reason.
        """


@dataclass(frozen=True, slots=True)
class _Match:
    """The comparisons of two candidates in both orders; `failure` is the error of an order that failed."""

    probability: float
    num_tokens: int
    has_verdict: bool
    failure: ScoringError | None


class PairwiseScorer(ReadsAnyPrompt):
    """Rewards candidates by how far they advance in a tournament; from 0 to ⌈log₂ N⌉."""

    needs = Needs(all_candidates=True)

    def __init__(self, name: str, compare: Comparator) -> None:
        self.name = name
        self._compare = compare

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Makes 2 (N − 1) comparisons in ⌈log₂ N⌉ consecutive rounds.

        Raises:
            ScoringError: no comparison gave a verdict.
        """
        rewards_N = [0.0] * len(candidates)
        remaining = list(range(len(candidates)))
        judged: set[int] = set()
        matches: list[_Match] = []
        while len(remaining) > 1:
            pairs = list(zip(remaining[::2], remaining[1::2], strict=False))
            played = await asyncio.gather(*(self._match(prompt, candidates[a], candidates[b]) for a, b in pairs))
            for (a, b), match in zip(pairs, played, strict=True):
                first_wins = match.probability >= UNDECIDED
                loser = b if first_wins else a
                remaining.remove(loser)
                rewards_N[loser] += 1 - match.probability if first_wins else match.probability
                judged |= {a, b} if match.has_verdict else set()
            for survivor in remaining:
                rewards_N[survivor] += 1
            matches += played
        if matches and not judged:
            failures = (match.failure for match in matches if match.failure)
            failure = next(failures, ScoringError("no comparison gave a verdict"))
            raise type(failure)(f"{self.name}: {failure}")
        return Scores(
            rewards_N=tuple(
                reward if index in judged or not matches else math.nan for index, reward in enumerate(rewards_N)
            ),
            scored_tokens=sum(match.num_tokens for match in matches),
        )

    async def close(self) -> None:
        """Does nothing: the owner of the comparator closes it."""

    async def _match(self, prompt: Prompt, first: Candidate, second: Candidate) -> _Match:
        """Compares the two in both orders; the result is the probability that `first` is better."""
        forward, backward = await asyncio.gather(
            self._compare(prompt, first, second), self._compare(prompt, second, first), return_exceptions=True
        )
        probabilities = []
        num_tokens = 0
        failure = None
        for comparison, is_reversed in ((forward, False), (backward, True)):
            if isinstance(comparison, Comparison):
                num_tokens += comparison.num_tokens
                probabilities.append(1 - comparison.probability if is_reversed else comparison.probability)
            elif isinstance(comparison, ScoringError):
                failure = comparison
            else:
                raise comparison
        verdicts = [probability for probability in probabilities if not math.isnan(probability)]
        return _Match(
            probability=(math.fsum(verdicts) + UNDECIDED * (2 - len(verdicts))) / 2,
            num_tokens=num_tokens,
            has_verdict=bool(verdicts),
            failure=failure,
        )
