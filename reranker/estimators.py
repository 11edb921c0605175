"""Estimators of best-of-n: expected reward, accuracy and KL from the policy, each with the paper it comes from.

Each estimates, for any n, from one scored pool of N >= n samples of a prompt: the mean over all C(N, n) subsets of n
samples. That is unbiased, and far less noisy than drawing n new samples. The mean is in closed form where one is known.
Each function is about one prompt; `bootstrap_mean` adds a confidence interval to the mean over prompts.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from random import Random

import numpy as np

from reranker.candidate import ScoredCandidate, Selection


def expected_max(scores_N: Sequence[float], n: int) -> float:
    """E[max of n] = Σ_i C(i, n−1) · s₍ᵢ₎ / C(N, n) over the scores in ascending order, i from 0.

    Of the subsets of size n, C(i, n−1) have s₍ᵢ₎ as their largest. The reward@n of best-of-n (Nakano et al. 2021,
    arXiv 2112.09332).

    Raises:
        ValueError: not 1 <= n <= N, or a score is NaN; only the caller can say what a missing score is worth.
    """
    return expected_value_of_best(scores_N, scores_N, n)


def expected_value_of_best(rewards_N: Sequence[float], values_N: Sequence[float], n: int) -> float:
    """The expected value of the winner, where the winner has the highest of `rewards_N` and counts with `values_N`.

    It falls with n where the reward is over-optimised (Gao et al. 2022, arXiv 2210.10760). As in `selection.argmax` a
    missing reward (NaN) never wins and ties go to the lowest index.

    Raises:
        ValueError: not 1 <= n <= N, lengths differ, or a value is NaN.
    """
    size = _pool_size(rewards_N, n)
    if any(math.isnan(value) for value in values_N):
        raise ValueError("a value is NaN; say what it is worth")
    worst_first = sorted(
        zip(rewards_N, values_N, range(size), strict=True),
        key=lambda row: (-math.inf if math.isnan(row[0]) else row[0], not math.isnan(row[0]), -row[2]),
    )
    ways = math.comb(size, n)
    return math.fsum(math.comb(rank, n - 1) / ways * value for rank, (_, value, _) in enumerate(worst_first))


def pass_at_n(num_samples: int, num_correct: int, n: int) -> float:
    """The probability that at least one of n samples is correct: 1 − C(N−c, n) / C(N, n).

    This is pass@k of Chen et al. 2021, arXiv 2107.03374: the accuracy of best-of-n with a perfect verifier.

    Raises:
        ValueError: not 1 <= n <= N, or not 0 <= c <= N.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples cannot be correct")
    _pool_size(range(num_samples), n)
    return 1 - math.comb(num_samples - num_correct, n) / math.comb(num_samples, n)


def majority_at_n(answers_N: Sequence[Hashable | None], correct: Hashable, n: int) -> float:
    """The probability that `selection.majority` over n of the answers returns the correct one; exact, no sampling.

    This is maj@n of Wang et al. 2022, arXiv 2203.11171. None has no vote; a draw of n times None is not correct. Of t
    answers with the most votes, each was drawn first with probability 1/t. The function counts the subsets in which
    the correct answer has v votes and no other answer has more, adding one distinct answer at a time.

    Raises:
        ValueError: not 1 <= n <= N, or the correct answer is None.
    """
    size = _pool_size(answers_N, n)
    if correct is None:
        raise ValueError("None stands for no answer and cannot be the correct one")
    others = Counter(answers_N)
    unanswered, voters = others.pop(None, 0), others.pop(correct, 0)
    won = Fraction(0)
    for votes in range(1, min(voters, n) + 1):
        ways = Counter({(drawn, 0): math.comb(unanswered, drawn) for drawn in range(min(unanswered, n - votes) + 1)})
        for count in others.values():
            extended: Counter[tuple[int, int]] = Counter()
            for (drawn, tied), before in ways.items():
                for more in range(min(count, votes, n - votes - drawn) + 1):
                    extended[drawn + more, tied + (more == votes)] += before * math.comb(count, more)
            ways = extended
        for (drawn, tied), before in ways.items():
            if drawn == n - votes:
                won += Fraction(math.comb(voters, votes) * before, tied + 1)
    return float(won / math.comb(size, n))


def expected_value_of_selected(
    scored_N: Sequence[ScoredCandidate],
    values: Mapping[int, float],
    n: int,
    select: Callable[[Sequence[ScoredCandidate]], Selection],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """The expected value of the winner that any `select` strategy picks from n of the pool; for example weighted-maj@n.

    `values` maps the index of a candidate to its value. The estimate is Monte Carlo: the mean over `draws` random
    subsets, the same for the same seed, with a standard error of at most half the range of the values / √draws. It is
    exact if there are no more than `draws` subsets. Among ties the pool's lowest index wins.

    Raises:
        ValueError: not 1 <= n <= N.
    """
    size = _pool_size(scored_N, n)
    if math.comb(size, n) <= draws:
        subsets = [list(subset) for subset in combinations(scored_N, n)]
    else:
        random = Random(seed)
        subsets = [random.sample(scored_N, n) for _ in range(draws)]
    return math.fsum(values[select(subset).winner.candidate.index] for subset in subsets) / len(subsets)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values_P: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean over prompts with its percentile bootstrap interval (Efron 1979); prompts are resampled, not samples.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values_P, dtype=np.float64)
    if values.size == 0:
        raise ValueError("there are no prompts to take the mean of")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(values.size, size=values.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def kl_upper_bound(n: int) -> float:
    """The upper bound of the KL divergence in nats: KL(best-of-n || policy) <= log n − (n−1)/n.

    Beirami et al. 2024, arXiv 2401.01879; equality needs a reward without ties and answers that are each improbable.

    The bound holds for every rule that returns one of n independent samples, voting and soft selection included. A set
    of answers with probability a under the policy contains one of n samples, and so the returned one, with probability
    at most 1 − (1−a)^n. Best-of-n reaches that for the sets of its top answers. So the density ratio of best-of-n
    majorises that of any other rule, and its KL, which is convex in the ratio, is the largest.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs at least one sample, not {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(policy_K: Sequence[float], rewards_K: Sequence[float], n: int) -> list[float]:
    """The distribution of best-of-n over the K answers of a policy (Beirami et al. 2024, arXiv 2401.01879).

    P(k) = F(k)^n − F(k−)^n, where F(k) is the policy's probability of a reward up to that of k, and F(k−) that of a
    smaller one. Answers of equal reward share their probability in proportion to the policy's.

    Raises:
        ValueError: n is below 1, lengths differ, a reward is NaN or the policy does not sum to 1.
    """
    if n < 1 or any(math.isnan(reward) for reward in rewards_K) or not math.isclose(math.fsum(policy_K), 1):
        raise ValueError("n must be at least 1, every reward a number, and the policy must sum to 1")
    mass: defaultdict[float, float] = defaultdict(float)
    for probability, reward in zip(policy_K, rewards_K, strict=True):
        mass[reward] += probability
    below, share = 0.0, {}
    for reward in sorted(mass):
        up_to = below + mass[reward]
        share[reward] = (up_to**n - below**n) / mass[reward] if mass[reward] else 0.0
        below = up_to
    return [probability * share[reward] for probability, reward in zip(policy_K, rewards_K, strict=True)]


def kl_divergence(chosen_K: Sequence[float], policy_K: Sequence[float]) -> float:
    """KL(chosen || policy) = Σ_k c_k · log(c_k / π_k), in nats; exact where the answers can be enumerated."""
    return math.fsum(c * math.log(c / p) for c, p in zip(chosen_K, policy_K, strict=True) if c > 0)


def _pool_size(pool: Sequence[object], n: int) -> int:
    if not 1 <= n <= len(pool):
        raise ValueError(f"n={n} samples cannot be drawn from a pool of {len(pool)}")
    return len(pool)
