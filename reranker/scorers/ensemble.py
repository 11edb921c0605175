"""Combines several scorers. SPEC `ensemble:mean:NAME,NAME,…`, `ensemble:min:…` or `ensemble:mean-std:K:…`.

The more candidates a reward model chooses among, the more likely it overrates the winner. Scorers with different
errors seldom overrate the same candidate, so a conservative combination of them resists that (Coste et al. 2023, arXiv
2310.02743):

    mean        the mean of the members' rewards
    min         the lowest of the members' rewards (WCO in the paper)
    mean-std    mean − K · standard deviation over the members, so that disagreement lowers the reward. The paper's
                UWO takes the variance; the deviation has the unit of the rewards, so the effect of K does not depend
                on their scale

Members are other served scorers, given by name. Each has its own unit: a judge grades from 1 to 10, a reward model in
log-odds. Added up unchanged, the member with the widest scale would decide alone. So the rewards of each member are
standardised over the candidates of the request, to mean 0 and standard deviation 1, or to all 0 if they are equal.
This has three consequences: scoring begins when the last candidate has finished; an ensemble's rewards are comparable
within a request only; and the reward of a single candidate is always 0.

Members score concurrently. None is left out silently, because with fewer members the reward would have another
meaning: a candidate that one member could not score has no reward, and if a member fails for all candidates, so does
the ensemble.
"""

import asyncio
import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores, ScoringError
from reranker.scorers.spec import Combination


class EnsembleScorer:
    """Combines the members' standardised rewards; the unit is standard deviations over the request's candidates."""

    def __init__(self, name: str, members: Sequence[Scorer], combination: Combination, k: float = 0.0) -> None:
        self.name = name
        self.needs = Needs.to_compare(members)
        self._members = members
        self._combination = combination
        self._k = k

    async def check(self, prompt: Prompt) -> None:
        """Raises `UnscorableError` if a member does."""
        for member in self._members:
            await member.check(prompt)

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
                raise type(outcome)(f"{self.name}: its member {member.name} failed: {outcome}") from outcome
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
        """Does nothing: the members are served on their own, and closed there."""


def standardised(rewards_N: Sequence[float]) -> list[float]:
    """Scales the finite rewards to mean 0 and standard deviation 1, or to all 0 if they are equal.

    NaN stays NaN. An infinite reward becomes NaN too, because it cannot be scaled.
    """
    finite = [reward for reward in rewards_N if math.isfinite(reward)]
    if not finite:
        return [math.nan] * len(rewards_N)
    mean, deviation = fmean(finite), pstdev(finite)
    return [(reward - mean) / (deviation or 1.0) if math.isfinite(reward) else math.nan for reward in rewards_N]


def combine(combination: Combination, rewards_M: Sequence[float], k: float = 0.0) -> float:
    """The ensemble's reward of one candidate from its M members; `k` weights the deviation in mean-std."""
    if combination == "min":
        return min(rewards_M)
    if combination == "mean":
        return fmean(rewards_M)
    return fmean(rewards_M) - k * pstdev(rewards_M)
