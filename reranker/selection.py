"""From scored candidates to a ranking: pure functions, each deterministic.

Two rules hold for all of them: a candidate without a reward (NaN) never stands before one that has a reward, and ties
go to the lowest index. `majority` alone does not look at rewards. Where votes are counted, `answers` tells each answer
by the index of its candidate, equal answers being equal (`reranker.answers` finds them). A candidate that is not in it
has no vote and stands behind those that have one; without a single vote the order is that of `argmax`.

How alike two texts are, between 0 and 1: the overlap of their character trigrams.

Sørensen-Dice over sets: 2·|A ∩ B| / (|A| + |B|), as in approximate string search. It needs no model and no notion of a
word, so it serves every script; it sees wording, not meaning.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from random import Random

from reranker.candidate import ScoredCandidate, Selection


def trigram_similarity(texts: Sequence[str]) -> list[list[float]]:
    """Of each with each, N × N: symmetric, 1 on the diagonal; case and the amount of white space do not count."""
    grams_N = [_trigrams(text) for text in texts]
    return [[_dice(one, other) for other in grams_N] for one in grams_N]


def _trigrams(text: str) -> set[str]:
    letters = " ".join(text.casefold().split())
    return {letters[start : start + 3] for start in range(max(1, len(letters) - 2))}


def _dice(one: set[str], other: set[str]) -> float:
    return 2 * len(one & other) / (len(one) + len(other))


Answers = Mapping[int, Hashable]


def argmax(scored: Iterable[ScoredCandidate]) -> Selection:
    """Highest reward first: best-of-N itself (Stiennon et al. 2020, arXiv 2009.01325)."""
    return _rank(scored, lambda candidate: candidate.reward)


def majority(scored: Iterable[ScoredCandidate], answers: Answers) -> Selection:
    """Most frequent answer first, whatever the rewards: self-consistency (Wang et al. 2022, arXiv 2203.11171).

    value(i) = Σ_j [answer_j = answer_i]
    """
    drawn = _in_order_of_drawing(scored)
    votes = Counter(answers[one.candidate.index] for one in drawn if one.candidate.index in answers)
    if not votes:
        return argmax(drawn)
    return _rank(drawn, lambda one: votes[answers[one.candidate.index]] if one.candidate.index in answers else math.nan)


def weighted_majority(scored: Iterable[ScoredCandidate], answers: Answers, temperature: float = 1.0) -> Selection:
    """The answer with the greatest weight first, and of those who give it the highest reward.

    value(i) = Σ_j [answer_j = answer_i] · w_j        w_j = exp((r_j − max r) / temperature)

    Li et al. 2022 (DiVeRSe, arXiv 2206.02336) sum a verifier's probabilities. A reward has any sign and, learnt from
    comparisons, an arbitrary zero; exponentials are positive, and their order does not depend on that zero. With them
    the winner is the likeliest answer of `soft`. Temperature towards infinity is `majority`, towards 0 `argmax`.
    """
    drawn = _in_order_of_drawing(scored)
    voters = [one for one in drawn if one.has_reward and one.candidate.index in answers]
    if not voters:
        return argmax(drawn)
    advantage = _advantages(voters, temperature)
    weights: defaultdict[Hashable, float] = defaultdict(float)
    for one in voters:
        weights[answers[one.candidate.index]] += math.exp(advantage[one.candidate.index])

    def weight(one: ScoredCandidate) -> float:
        if not one.has_reward:
            return math.nan
        return weights[answers[one.candidate.index]] if one.candidate.index in answers else -math.inf

    return _rank(drawn, weight, lambda one: one.reward)


def soft(scored: Iterable[ScoredCandidate], temperature: float, seed: int) -> Selection:
    """Draws the winner, P(i) ∝ exp(r_i / temperature): soft best-of-N (Verdun et al. 2025, arXiv 2505.03156).

    The rest of the ranking is drawn likewise from what is left: all at once by the Gumbel trick, highest
    r_i / temperature + g_i first, where g_i depends on the seed and the index i alone. Temperature towards infinity is
    a plain sample of the policy, towards 0 `argmax`.
    """
    drawn = _in_order_of_drawing(scored)
    advantage = _advantages(drawn, temperature)
    random = Random(seed)
    gumbel_N = [-math.log(random.expovariate(1) or sys.float_info.min) for _ in range(1 + max(advantage, default=-1))]
    return _rank(drawn, lambda one: advantage[one.candidate.index] + gumbel_N[one.candidate.index])


def mbr(scored: Iterable[ScoredCandidate], beta: float = 1.0) -> Selection:
    """Reward plus closeness to the other candidates first: MBR-BoN (Jinnai et al. 2024, arXiv 2404.01054).

    value(i) = r_i + beta · (1/N) Σ_j u(y_i, y_j)

    An outlier that only fools the reward model is far from the rest, which are samples of the policy. The sum runs over
    all N candidates, i itself and those without a reward too. The paper takes the cosine of sentence embeddings for u;
    here it is the overlap of character trigrams (`similarity`), which needs no second model. beta 0 is `argmax`.
    """
    drawn = _in_order_of_drawing(scored)
    similarity_N_N = trigram_similarity([one.candidate.text for one in drawn])
    closeness = {one.candidate.index: sum(row) / len(row) for one, row in zip(drawn, similarity_N_N, strict=True)}
    return _rank(drawn, lambda one: one.reward + beta * closeness[one.candidate.index])


def by_logprob(scored: Iterable[ScoredCandidate]) -> Selection:
    """Highest mean log-probability a token first: what the policy itself finds likeliest, whatever the rewards.

    The mean, not the sum, so that a candidate does not win by being short.
    """
    return _rank(scored, lambda one: one.candidate.mean_logprob)


def by_index(scored: Iterable[ScoredCandidate]) -> Selection:
    """The order they were drawn in: an ordinary single sample comes first."""
    return Selection(tuple(_in_order_of_drawing(scored)))


def _in_order_of_drawing(scored: Iterable[ScoredCandidate]) -> list[ScoredCandidate]:
    """So that sums of floats do not depend on who finished first."""
    return sorted(scored, key=lambda one: one.candidate.index)


def _advantages(scored: list[ScoredCandidate], temperature: float) -> dict[int, float]:
    """By index, (r_i − max r) / temperature: at most 0, so its exponential cannot overflow; NaN without a reward."""
    best = max((one.reward for one in scored if one.has_reward), default=0.0)
    return {
        one.candidate.index: 0.0 if one.reward == best else (one.reward - best) / temperature  # inf − inf is NaN
        for one in scored
    }


def _rank(scored: Iterable[ScoredCandidate], *values_of: Callable[[ScoredCandidate], float]) -> Selection:
    """Highest value first, NaN last; the next value decides among equals, and at last the index."""

    def key(one: ScoredCandidate) -> tuple[list[tuple[bool, float]], int]:
        values = [value_of(one) for value_of in values_of]
        return [(math.isnan(value), 0.0 if math.isnan(value) else -value) for value in values], one.candidate.index

    return Selection(tuple(sorted(scored, key=key)))
