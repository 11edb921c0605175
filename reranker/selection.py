"""Ranks scored candidates: pure, deterministic functions, one per strategy.

Ties go to the lowest index. A candidate without a reward (NaN) never ranks above one with a reward, except in
`majority`, which ignores rewards. The voting functions take `answers`: the index of a candidate mapped to its answer,
normalised so that equal answers are equal (`reranker.answers`). A candidate without an answer has no vote and ranks
below those that have one. If nobody has a vote, the ranking is that of `argmax`.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from random import Random

from reranker.candidate import ScoredCandidate, Selection

Answers = Mapping[int, Hashable]
"""The index of a candidate -> its answer."""


def argmax(scored: Iterable[ScoredCandidate]) -> Selection:
    """Highest reward first: best-of-N itself (Stiennon et al. 2020, arXiv 2009.01325)."""
    return _rank(scored, lambda candidate: candidate.reward)


def majority(scored: Iterable[ScoredCandidate], answers: Answers) -> Selection:
    """Most frequent answer first, whatever the rewards: self-consistency (Wang et al. 2022, arXiv 2203.11171).

    value(i) = Σ_j [answer_j = answer_i]
    """
    drawn = _in_order_of_drawing(scored)
    votes = Counter(answers[sample.candidate.index] for sample in drawn if sample.candidate.index in answers)
    if not votes:
        return argmax(drawn)

    def votes_of(sample: ScoredCandidate) -> float:
        index = sample.candidate.index
        return votes[answers[index]] if index in answers else math.nan

    return _rank(drawn, votes_of)


def weighted_majority(scored: Iterable[ScoredCandidate], answers: Answers, temperature: float = 1.0) -> Selection:
    """The answer with the greatest weight first; among candidates with that answer, the highest reward first.

    value(i) = Σ_j [answer_j = answer_i] · w_j        w_j = exp((r_j − max r) / temperature)

    Li et al. 2022 (DiVeRSe, arXiv 2206.02336) sum a verifier's probabilities. A reward can have any sign and, learnt
    from comparisons, an arbitrary zero; exponentials are positive, and their order does not depend on that zero. With
    them the winner is the most likely answer of `soft`. As the temperature goes to infinity, this becomes `majority`;
    as it goes to 0, `argmax`.
    """
    drawn = _in_order_of_drawing(scored)
    voters = [sample for sample in drawn if sample.has_reward and sample.candidate.index in answers]
    if not voters:
        return argmax(drawn)
    advantage = _advantages(voters, temperature)
    weights: defaultdict[Hashable, float] = defaultdict(float)
    for voter in voters:
        weights[answers[voter.candidate.index]] += math.exp(advantage[voter.candidate.index])

    def weight(sample: ScoredCandidate) -> float:
        if not sample.has_reward:
            return math.nan
        return weights[answers[sample.candidate.index]] if sample.candidate.index in answers else -math.inf

    return _rank(drawn, weight, lambda sample: sample.reward)


def soft(scored: Iterable[ScoredCandidate], temperature: float, seed: int) -> Selection:
    """Draws the winner, P(i) ∝ exp(r_i / temperature): soft best-of-N (Verdun et al. 2025, arXiv 2505.03156).

    The rest of the ranking is drawn in the same way from the remaining candidates. The Gumbel trick draws all at once:
    highest r_i / temperature + g_i first, where g_i depends only on the seed and the index i. As the temperature goes
    to infinity, the winner is a plain sample of the policy; as it goes to 0, this becomes `argmax`.
    """
    drawn = _in_order_of_drawing(scored)
    advantage = _advantages(drawn, temperature)
    random = Random(seed)
    gumbel_N = [-math.log(random.expovariate(1) or sys.float_info.min) for _ in range(1 + max(advantage, default=-1))]
    return _rank(drawn, lambda sample: advantage[sample.candidate.index] + gumbel_N[sample.candidate.index])


def mbr(scored: Iterable[ScoredCandidate], beta: float = 1.0) -> Selection:
    """Highest reward plus similarity to the other candidates first: MBR-BoN (Jinnai et al. 2024, arXiv 2404.01054).

    value(i) = r_i + beta · (1/N) Σ_j u(y_i, y_j)

    An outlier that only fools the reward model is far from the other samples of the policy. The sum runs over all N
    candidates, including i itself and those without a reward. The paper takes the cosine of sentence embeddings for u;
    here it is `trigram_similarity`, which needs no second model. With beta 0 this is `argmax`.
    """
    drawn = _in_order_of_drawing(scored)
    similarity_N_N = trigram_similarity([sample.candidate.text for sample in drawn])
    closeness = {sample.candidate.index: sum(row) / len(row) for sample, row in zip(drawn, similarity_N_N, strict=True)}
    return _rank(drawn, lambda sample: sample.reward + beta * closeness[sample.candidate.index])


def by_logprob(scored: Iterable[ScoredCandidate]) -> Selection:
    """Highest mean log-probability per token first: what the policy itself finds most likely, whatever the rewards.

    It is the mean and not the sum, so that a candidate does not win by being short.
    """
    return _rank(scored, lambda sample: sample.candidate.mean_logprob)


def by_index(scored: Iterable[ScoredCandidate]) -> Selection:
    """The order in which candidates were drawn, so that the winner is an ordinary single sample."""
    return Selection(tuple(_in_order_of_drawing(scored)))


def trigram_similarity(texts_N: Sequence[str]) -> list[list[float]]:
    """similarity_N_N of texts, from 0 to 1: the overlap of their sets of character trigrams.

    Sørensen-Dice: 2·|A ∩ B| / (|A| + |B|), as in approximate string search. It is symmetric and 1 on the diagonal; case
    and the amount of white space do not count. It needs no model and no notion of a word, so it works for every
    script. It compares wording, not meaning.
    """
    trigrams_N = [_trigrams(text) for text in texts_N]
    return [[_dice(left, right) for right in trigrams_N] for left in trigrams_N]


def _trigrams(text: str) -> set[str]:
    letters = " ".join(text.casefold().split())
    return {letters[start : start + 3] for start in range(max(1, len(letters) - 2))}


def _dice(left: set[str], right: set[str]) -> float:
    return 2 * len(left & right) / (len(left) + len(right))


def _in_order_of_drawing(scored: Iterable[ScoredCandidate]) -> list[ScoredCandidate]:
    """Sorts by index, so that sums of floats do not depend on which candidate finished first."""
    return sorted(scored, key=lambda sample: sample.candidate.index)


def _advantages(scored: list[ScoredCandidate], temperature: float) -> dict[int, float]:
    """By index, (r_i − max r) / temperature: at most 0, so its exponential cannot overflow; NaN without a reward."""
    best = max((sample.reward for sample in scored if sample.has_reward), default=0.0)

    def advantage(reward: float) -> float:
        return 0.0 if reward == best else (reward - best) / temperature  # 0 for the best, since inf − inf is NaN

    return {sample.candidate.index: advantage(sample.reward) for sample in scored}


def _rank(scored: Iterable[ScoredCandidate], *values_of: Callable[[ScoredCandidate], float]) -> Selection:
    """Highest value first, NaN last; ties are broken by the next value and finally by the index."""

    def key(sample: ScoredCandidate) -> tuple[list[tuple[bool, float]], int]:
        values = [value_of(sample) for value_of in values_of]
        return [(math.isnan(value), 0.0 if math.isnan(value) else -value) for value in values], sample.candidate.index

    return Selection(tuple(sorted(scored, key=key)))
