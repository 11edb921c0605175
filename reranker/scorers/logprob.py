"""No reward model at all: what the policy's own probabilities say about a candidate.

Both read what the generator told when it drew the candidate, so they cost no tokens, and a candidate that came from
elsewhere (the score endpoint, an upstream that hides its log-probabilities) has no reward.

`logprob` is the mean log-probability a token, not the sum: every token makes a sum smaller, so it would mostly favour
short candidates.

`self_certainty` is how far from uniform the policy's distributions were, mean over the candidate's tokens. Kang et al.
2025 (arXiv 2502.18581) take KL(U ‖ p) with U uniform over the vocabulary of V tokens,

    −1/V · Σ_{j=1…V} log(V · p_j)

and need all V log-probabilities of every token, which no server tells. The estimate here is the same sum over the k
most likely tokens alone,

    −1/k · Σ_{j=1…k} log(k · p_j)

which is the token confidence of Fu et al. 2025 (arXiv 2508.15260) less the constant log k. It is never below 0: the k
probabilities sum to at most 1. A certain policy leaves little probability to the runners-up, and scores high. Its
values are not those of the definition over the vocabulary, and not comparable between different k.
"""

import math
from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scores, ScoringError

SELF_CERTAINTY_TOKENS = 20
"""k: the most that OpenAI's interface and vLLM by default tell of a token."""


class LogprobScorer:
    """Rewards the candidates that the policy itself finds likeliest; nats a token, at most 0."""

    needs = Needs(likelihood=True)

    def __init__(self, name: str) -> None:
        self.name = name

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """NaN for a candidate whose log-probability is unknown.

        Raises:
            ScoringError: none is known.
        """
        return _scores(self.name, [one.mean_logprob for one in candidates])

    async def close(self) -> None:
        """Holds nothing."""


class SelfCertaintyScorer:
    """Rewards the candidates that the policy was surest of while it wrote them; nats a token, at least 0."""

    needs = Needs(top_logprobs=SELF_CERTAINTY_TOKENS)

    def __init__(self, name: str) -> None:
        self.name = name

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """NaN for a candidate whose most likely tokens are unknown.

        Raises:
            ScoringError: none is known.
        """
        return _scores(self.name, [self_certainty(one) for one in candidates])

    async def close(self) -> None:
        """Holds nothing."""


def self_certainty(candidate: Candidate) -> float:
    """The estimate above, mean over the tokens; NaN where one token's rivals are unknown or without tokens.

    A rival of probability zero (−∞) is left out: it would make any candidate infinitely certain.
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
