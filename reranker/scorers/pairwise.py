"""Comparisons turned into rewards by a knockout tournament. SPEC `pairwise:judge:MODEL`.

Some judges tell better which of two is better than how good one is. N candidates need N − 1 matches in ⌈log₂ N⌉
rounds, and the matches of a round are played at once:

    round 1    0–1   2–3   4        the odd one out, always the last, goes through without a match
    round 2    w–w   4
    round 3    w–4                  N = 5: 4 matches, 3 rounds

A match is played twice, with either candidate shown first, since judges favour a place; its probability is the mean of
both. An order that gives no verdict counts as undecided, .5. At .5 the lower index goes through.

The reward of a candidate is the number of rounds it came through, byes included, plus the probability with which it
was thought the better one in the match it lost (at most .5, so rounds never mix): of two that go out in one round the
narrower loser stands higher. The winner came through all ⌈log₂ N⌉. A tournament orders its winner well and the others
roughly: whoever meets the best early goes out early. A candidate none of whose matches had a verdict has no reward,
however far it came.

Such rewards compare the candidates of one tournament and say nothing beside those of another. So all of a request's
candidates are needed at once, and scoring begins when the last has finished.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scores, ScoringError

UNDECIDED = 0.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """The probability, 0 to 1, that the first of two is better (NaN: no verdict), and the tokens it took to find it."""

    probability: float
    num_tokens: int = 0


class Compare(Protocol):
    """Says which of two candidates is better; the order in which they are given may sway it."""

    async def __call__(self, prompt: Prompt, first: Candidate, second: Candidate) -> Comparison:
        """The comparison in this order.

        Raises:
            ScoringError: there is none, and why.
        """


@dataclass(frozen=True, slots=True)
class _Match:
    """Both orders of one comparison; `failure` is what an order without an answer raised."""

    probability: float
    num_tokens: int
    has_verdict: bool
    failure: ScoringError | None


class PairwiseScorer:
    """Rewards candidates by how far they come in a tournament; 0 to ⌈log₂ N⌉."""

    needs = Needs(all_candidates=True)

    def __init__(self, name: str, compare: Compare) -> None:
        self.name = name
        self._compare = compare

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """2 (N − 1) comparisons, in ⌈log₂ N⌉ rounds one after the other.

        Raises:
            ScoringError: not one comparison gave a verdict.
        """
        rewards_N = [0.0] * len(candidates)
        standing = list(range(len(candidates)))
        judged: set[int] = set()
        matches: list[_Match] = []
        while len(standing) > 1:
            pairs = list(zip(standing[::2], standing[1::2], strict=False))
            played = await asyncio.gather(*(self._match(prompt, candidates[a], candidates[b]) for a, b in pairs))
            for (a, b), match in zip(pairs, played, strict=True):
                first_wins = match.probability >= UNDECIDED
                loser = b if first_wins else a
                standing.remove(loser)
                rewards_N[loser] += 1 - match.probability if first_wins else match.probability
                judged |= {a, b} if match.has_verdict else set()
            for survivor in standing:
                rewards_N[survivor] += 1
            matches += played
        if matches and not judged:
            reason = next((match.failure for match in matches if match.failure), "it never said which is better")
            raise ScoringError(f"{self.name}: {reason}")
        return Scores(
            rewards_N=tuple(
                reward if place in judged or not matches else math.nan for place, reward in enumerate(rewards_N)
            ),
            scored_tokens=sum(match.num_tokens for match in matches),
        )

    async def close(self) -> None:
        """Holds nothing; whoever gave the comparison owns it."""

    async def _match(self, prompt: Prompt, first: Candidate, second: Candidate) -> _Match:
        """The probability that `first` is better, the same whichever is called first."""
        forth, back = await asyncio.gather(
            self._compare(prompt, first, second), self._compare(prompt, second, first), return_exceptions=True
        )
        probabilities = []
        num_tokens = 0
        failure = None
        for comparison, turned in ((forth, False), (back, True)):
            if isinstance(comparison, Comparison):
                num_tokens += comparison.num_tokens
                probabilities.append(1 - comparison.probability if turned else comparison.probability)
            elif isinstance(comparison, ScoringError):
                failure = comparison
            else:
                raise comparison
        verdicts = [one for one in probabilities if not math.isnan(one)]
        return _Match(
            probability=(math.fsum(verdicts) + UNDECIDED * (2 - len(verdicts))) / 2,
            num_tokens=num_tokens,
            has_verdict=bool(verdicts),
            failure=failure,
        )
