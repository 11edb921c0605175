"""A cheap scorer prunes, a dear one decides. SPEC `cascade:KEEP:CHEAP,DEAR`.

CHEAP ranks all candidates and the best KEEP of them go to DEAR, whose rewards are the cascade's. KEEP is a count, or
below 1 a share of the candidates, rounded up. What was pruned has no reward, so it never wins and stands behind all
that have one. Where CHEAP has no reward for a candidate, that one is pruned first; where two are equal, the later one.

It saves what DEAR would have cost on candidates that CHEAP is sure of. The winner is DEAR's as long as CHEAP lets it
through, so KEEP is chosen by how far down CHEAP's ranking DEAR's winner is ever found. Both are other served scorers,
by name. All candidates must be there before any is pruned: scoring begins when the last has finished.
"""

import math
from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores
from reranker.stopping import EPSILON


class CascadeScorer:
    """The rewards of `dear` for those that `cheap` ranks highest; NaN for the others."""

    def __init__(self, name: str, cheap: Scorer, dear: Scorer, keep: float) -> None:
        self.name = name
        self.needs = Needs.to_compare((cheap, dear))
        self._cheap = cheap
        self._dear = dear
        self._keep = keep

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """NaN for a candidate that was pruned, or that the dear scorer could not score.

        Raises:
            ScoringError: one of the two failed.
        """
        count = kept_of(len(candidates), self._keep)
        if count == len(candidates):
            return await self._dear.score(prompt, candidates)
        cheap = await self._cheap.score(prompt, candidates)
        kept_K = best(cheap.rewards_N, count)
        dear = await self._dear.score(prompt, [candidates[place] for place in kept_K])
        rewards = dict(zip(kept_K, dear.rewards_N, strict=True))
        return Scores(
            rewards_N=tuple(rewards.get(place, math.nan) for place in range(len(candidates))),
            scored_tokens=cheap.scored_tokens + dear.scored_tokens,
            prompt_tokens_cut=max(cheap.prompt_tokens_cut, dear.prompt_tokens_cut),
        )

    async def close(self) -> None:
        """Holds nothing; its members are served, and closed, by themselves."""


def kept_of(candidates: int, keep: float) -> int:
    """How many of them go on: at least one."""
    return min(candidates, max(1, math.ceil(keep * candidates - EPSILON)) if keep < 1 else int(keep))


def best(rewards_N: Sequence[float], count: int) -> list[int]:
    """The places of the highest rewards, in order of place."""
    ranked = sorted(range(len(rewards_N)), key=lambda place: (math.isnan(rewards_N[place]), -rewards_N[place], place))
    return sorted(ranked[:count])
