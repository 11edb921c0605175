"""Rewards from the policy's own log-probabilities, without a reward model. SPEC `logprob` or `self_certainty`.

Both read the log-probabilities that the generator returned with the candidate, so they cost no tokens. A candidate
without them (from the score endpoint, or an upstream that does not return log-probabilities) has no reward.

`logprob` is the mean log-probability per token. It is not the sum, because each token lowers a sum, which would mostly
favour short candidates.

`self_certainty` is how far the policy's distributions were from uniform, as a mean over the candidate's tokens. Kang et
al. 2025 (arXiv 2502.18581) take KL(U ‖ p) with U uniform over the vocabulary of V tokens,

    −1/V · Σ_{j=1…V} log(V · p_j)

and need all V log-probabilities of every token, which no server returns. The estimate here is the same sum over only
the k most likely tokens,

    −1/k · Σ_{j=1…k} log(k · p_j)

which is the token confidence of Fu et al. 2025 (arXiv 2508.15260) minus the constant log k. It is never below 0,
because the k probabilities sum to at most 1. It is high where the policy leaves little probability to the tokens after
the most likely one. Its values differ from those of the definition over the vocabulary, and are not comparable between
different k.
"""

import math
from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, ReadsAnyPrompt, Scores, ScoringError

SELF_CERTAINTY_TOKENS = 20
"""k: the most that OpenAI's API, and vLLM by default, return for a token."""


class LogprobScorer(ReadsAnyPrompt):
    """Rewards a candidate with its mean log-probability under the policy; nats per token, at most 0."""

    needs = Needs(likelihood=True)

    def __init__(self, name: str) -> None:
        self.name = name

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """NaN for a candidate whose log-probability is unknown.

        Raises:
            ScoringError: the log-probabilities of all candidates are unknown.
        """
        return _scores(self.name, [candidate.mean_logprob for candidate in candidates])

    async def close(self) -> None:
        """Does nothing."""


class SelfCertaintyScorer(ReadsAnyPrompt):
    """Rewards a candidate with how certain the policy was of its tokens; nats per token, at least 0."""

    needs = Needs(top_logprobs=SELF_CERTAINTY_TOKENS)

    def __init__(self, name: str) -> None:
        self.name = name

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """NaN for a candidate whose most likely tokens are unknown.

        Raises:
            ScoringError: the most likely tokens of all candidates are unknown.
        """
        return _scores(self.name, [self_certainty(candidate) for candidate in candidates])

    async def close(self) -> None:
        """Does nothing."""


def self_certainty(candidate: Candidate) -> float:
    """The estimate of the module header, as a mean over the T tokens; NaN without tokens or with an empty top list.

    A top token of probability zero (−∞) is left out, because it would make the certainty infinite.
    """
    certainties_T = []
    for token in candidate.logprobs or ():
        top_K = [logprob for _, logprob in token.top if logprob > -math.inf]
        if not top_K:
            return math.nan
        certainties_T.append(-math.fsum(top_K) / len(top_K) - math.log(len(top_K)))
    return math.fsum(certainties_T) / len(certainties_T) if certainties_T else math.nan


def _scores(name: str, rewards_N: Sequence[float]) -> Scores:
    if all(math.isnan(reward) for reward in rewards_N):
        raise ScoringError(f"{name}: none of these candidates has tokens whose log-probabilities are known")
    return Scores(tuple(rewards_N), scored_tokens=0)
