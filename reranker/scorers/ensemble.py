"""Several scorers as one. SPEC `ensemble:mean:NAME,NAME,…`, `ensemble:min:…` or `ensemble:mean-std:K:…`.

The more candidates a reward model chooses among, the likelier the winner is one that it merely overrates. Scorers that
err differently seldom overrate the same candidate, so a conservative sum over them resists (Coste et al. 2023, arXiv
2310.02743):

    mean        of the members' rewards
    min         the least of them: a candidate is as good as its severest member finds it (their WCO)
    mean-std    mean − K · standard deviation over the members: disagreement is held against a candidate. Their UWO
                takes the variance; the deviation has the unit of the rewards, so K means the same whatever their scale

Members are other served scorers, by name, and measure in units of their own: a judge from 1 to 10, a reward model in
log-odds. Added up as they are, the widest scale would decide alone. So each member's rewards are standardised over the
candidates of the request, to mean 0 and standard deviation 1, or all 0 where it finds no difference. For that all
candidates must be there: scoring begins when the last has finished. It also means that an ensemble's rewards compare
the candidates of one request and say nothing beside those of another, and that a single candidate is always worth 0.

Members score at the same time. None is left out silently: a candidate that one member could not score has no reward,
and if one member fails altogether, so does the ensemble. With fewer members the reward would mean something else.
"""

import asyncio
import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores, ScoringError
from reranker.scorers.spec import Combination


class EnsembleScorer:
    """Combines the standardised rewards of its members; in standard deviations over the request's candidates."""

    def __init__(self, name: str, members: Sequence[Scorer], combination: Combination, k: float = 0.0) -> None:
        self.name = name
        self.needs = Needs.to_compare(members)
        self._members = members
        self._combination = combination
        self._k = k

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """NaN for a candidate that a member could not score.

        Raises:
            ScoringError: a member failed; the message names it.
        """
        outcomes_M = await asyncio.gather(
            *(member.score(prompt, candidates) for member in self._members), return_exceptions=True
        )
        scores_M = []
        for member, outcome in zip(self._members, outcomes_M, strict=True):
            if isinstance(outcome, ScoringError):
                raise ScoringError(f"{self.name}: its member {member.name} failed: {outcome}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome
            scores_M.append(outcome)
        standardised_M_N = [standardised(scores.rewards_N) for scores in scores_M]
        return Scores(
            rewards_N=tuple(
                math.nan if any(map(math.isnan, rewards_M)) else combine(self._combination, rewards_M, self._k)
                for rewards_M in zip(*standardised_M_N, strict=True)
            ),
            scored_tokens=sum(scores.scored_tokens for scores in scores_M),
            prompt_tokens_cut=max(scores.prompt_tokens_cut for scores in scores_M),
        )

    async def close(self) -> None:
        """Holds nothing; its members are served, and closed, by themselves."""


def standardised(rewards_N: Sequence[float]) -> list[float]:
    """Mean 0 and standard deviation 1 over those that are there; all 0 where they are equal.

    NaN stays NaN, and so does an infinite reward become, which has no place on any scale.
    """
    there = [reward for reward in rewards_N if math.isfinite(reward)]
    if not there:
        return [math.nan] * len(rewards_N)
    mean, deviation = fmean(there), pstdev(there)
    return [(reward - mean) / (deviation or 1.0) if math.isfinite(reward) else math.nan for reward in rewards_N]


def combine(combination: Combination, rewards_M: Sequence[float], k: float = 0.0) -> float:
    """One candidate's rewards of all members as one; `k` is the weight of the deviation in mean-std."""
    if combination == "min":
        return min(rewards_M)
    if combination == "mean":
        return fmean(rewards_M)
    return fmean(rewards_M) - k * pstdev(rewards_M)
