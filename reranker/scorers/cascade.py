"""A cheap scorer prunes, an expensive one decides. SPEC `cascade:KEEP:CHEAP,EXPENSIVE`.

CHEAP ranks all candidates. The best KEEP of them are scored by EXPENSIVE, whose rewards are those of the cascade. KEEP
is a count, or below 1 a share of the candidates, rounded up. A pruned candidate has no reward, so it never wins and
ranks below all that have one. Candidates without a reward from CHEAP are pruned first; of two equal ones the later is
pruned first.

A cascade saves the cost of EXPENSIVE on the candidates that CHEAP ranks low. The winner is that of EXPENSIVE alone as
long as CHEAP does not prune it, so choose KEEP by how far down CHEAP's ranking EXPENSIVE's winner is ever found. Both
are other served scorers, given by name. Scoring begins when the last candidate has finished, because pruning needs all
of them.
"""

import math
from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores
from reranker.stopping import EPSILON


class CascadeScorer:
    """The rewards of `expensive` for the candidates that `cheap` ranks highest; NaN for the others."""

    def __init__(self, name: str, cheap: Scorer, expensive: Scorer, keep: float) -> None:
        self.name = name
        self.needs = Needs.to_compare((cheap, expensive))
        self._cheap = cheap
        self._expensive = expensive
        self._keep = keep

    async def check(self, prompt: Prompt) -> None:
        """Raises `UnscorableError` if one of the two does."""
        await self._cheap.check(prompt)
        await self._expensive.check(prompt)

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """NaN for a candidate that was pruned, or that the expensive scorer could not score.

        Raises:
            ScoringError: one of the two scorers failed.
        """
        count = kept_count(len(candidates), self._keep)
        if count == len(candidates):
            return await self._expensive.score(prompt, candidates)
        cheap = await self._cheap.score(prompt, candidates)
        kept_K = best_indices(cheap.rewards_N, count)
        expensive = await self._expensive.score(prompt, [candidates[index] for index in kept_K])
        rewards = dict(zip(kept_K, expensive.rewards_N, strict=True))
        return Scores(
            rewards_N=tuple(rewards.get(index, math.nan) for index in range(len(candidates))),
            scored_tokens=cheap.scored_tokens + expensive.scored_tokens,
            prompt_tokens_cut=max(cheap.prompt_tokens_cut, expensive.prompt_tokens_cut),
        )

    async def close(self) -> None:
        """Does nothing: the two scorers are served on their own, and closed there."""


def kept_count(candidates: int, keep: float) -> int:
    """How many of this number of candidates the expensive scorer gets: at least one."""
    return min(candidates, max(1, math.ceil(keep * candidates - EPSILON)) if keep < 1 else int(keep))


def best_indices(rewards_N: Sequence[float], count: int) -> list[int]:
    """The indices of the `count` highest rewards, in ascending order."""
    ranked = sorted(range(len(rewards_N)), key=lambda index: (math.isnan(rewards_N[index]), -rewards_N[index], index))
    return sorted(ranked[:count])
