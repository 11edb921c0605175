"""Estimators against numbers computed by hand, and against the mean over all subsets of a small pool."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations, permutations, product
from random import Random
from statistics import fmean

import pytest

from reranker.candidate import Candidate, ScoredCandidate
from reranker.estimators import (
    best_of_n_distribution,
    bootstrap_mean,
    expected_max,
    expected_value_of_best,
    expected_value_of_selected,
    kl_divergence,
    kl_upper_bound,
    majority_at_n,
    pass_at_n,
)
from reranker.selection import argmax, majority, weighted_majority

NAN = math.nan


def scored(rewards: Sequence[float]) -> list[ScoredCandidate]:
    return [ScoredCandidate(Candidate(index, "", 0), reward) for index, reward in enumerate(rewards)]


class TestExpectedMax:
    @pytest.mark.parametrize(("n", "expected"), [(1, 1.5), (2, 14 / 6), (3, 2.75), (4, 3.0)])
    def test_worked_by_hand(self, n: int, expected: float) -> None:
        # Scores 0, 1, 2, 3. Of the six pairs one has the largest 1, two have 2, three have 3: 14/6.
        assert expected_max([2.0, 0.0, 3.0, 1.0], n) == pytest.approx(expected)

    @pytest.mark.parametrize("n", range(1, 7))
    def test_it_is_the_mean_over_all_subsets(self, n: int) -> None:
        scores = [0.3, -1.0, 2.5, 0.3, 7.0, -4.0]
        assert expected_max(scores, n) == pytest.approx(fmean(max(subset) for subset in combinations(scores, n)))

    def test_a_large_pool_does_not_overflow(self) -> None:
        assert expected_max([0.0] * 1999 + [1.0], 1000) == pytest.approx(0.5)

    @pytest.mark.parametrize("n", [0, 3])
    def test_n_beyond_the_pool_is_refused(self, n: int) -> None:
        with pytest.raises(ValueError, match="pool of 2"):
            expected_max([1.0, 2.0], n)

    def test_a_missing_score_is_refused(self) -> None:
        with pytest.raises(ValueError, match="NaN"):
            expected_max([1.0, NAN], 1)


class TestExpectedValueOfBest:
    def test_worked_by_hand(self) -> None:
        # Rewards order the values 5, 1, 4 from worst to best. Pairs: {5,1} gives 1, {5,4} gives 4, {1,4} gives 4.
        assert expected_value_of_best([0.1, 0.2, 0.3], [5.0, 1.0, 4.0], 2) == pytest.approx(3.0)

    @pytest.mark.parametrize("n", range(1, 7))
    def test_it_is_the_mean_over_all_subsets_with_ties_and_missing_rewards(self, n: int) -> None:
        rewards, values = [0.5, NAN, 0.5, 2.0, -math.inf, NAN], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
        pool = scored(rewards)
        winners = [argmax(subset).winner.candidate.index for subset in combinations(pool, n)]
        assert expected_value_of_best(rewards, values, n) == pytest.approx(fmean(values[index] for index in winners))


class TestPassAtN:
    def test_worked_by_hand(self) -> None:
        # Four samples, one correct: a pair holds it in 3 of 6 cases.
        assert [pass_at_n(4, 1, n) for n in (1, 2, 3, 4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])

    @pytest.mark.parametrize(("correct", "n"), product(range(6), range(1, 6)))
    def test_it_is_the_share_of_subsets_with_a_correct_sample(self, correct: int, n: int) -> None:
        samples = [index < correct for index in range(5)]
        assert pass_at_n(5, correct, n) == pytest.approx(fmean(any(subset) for subset in combinations(samples, n)))

    @pytest.mark.parametrize(("samples", "correct", "n"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
    def test_impossible_counts_are_refused(self, samples: int, correct: int, n: int) -> None:
        with pytest.raises(ValueError, match="cannot be"):
            pass_at_n(samples, correct, n)


def majority_over_every_draw(answers: Sequence[Hashable | None], correct: Hashable, n: int) -> float:
    """The probability over every ordered draw of n, decided by the function that serves requests."""
    draws = list(permutations(answers, n))
    won = 0
    for draw in draws:
        votes = {index: answer for index, answer in enumerate(draw) if answer is not None}
        winner = majority(scored([NAN] * n), votes).winner.candidate.index
        won += votes.get(winner) == correct
    return won / len(draws)


class TestMajorityAtN:
    def test_worked_by_hand(self) -> None:
        # a, a, b: of one draw a is 2/3; of two, {a,a} gives a and {a,b} (twice) a tie: 1/3 + 2/3 · 1/2; of three a.
        assert [majority_at_n("aab", "a", n) for n in (1, 2, 3)] == pytest.approx([2 / 3, 2 / 3, 1.0])

    @pytest.mark.parametrize("answers", ["aabbc", "aaabb", "abcde", "ab--a", "-----", "bbbbb", "aabb-c"])
    @pytest.mark.parametrize("n", range(1, 6))
    def test_it_equals_majority_over_every_draw(self, answers: str, n: int) -> None:
        pool = [None if answer == "-" else answer for answer in answers]
        assert majority_at_n(pool, "a", n) == pytest.approx(majority_over_every_draw(pool, "a", n))

    def test_it_is_exact_for_a_pool_of_64(self) -> None:
        # All wrong answers differ, so two votes win for the correct one. P(no vote) and P(one vote) are counted.
        pool = ["right"] * 8 + [f"wrong {index}" for index in range(56)]
        ways = math.comb(64, 16)
        no_vote, one_vote = math.comb(56, 16) / ways, 8 * math.comb(56, 15) / ways
        assert majority_at_n(pool, "right", 16) == pytest.approx(1 - no_vote - one_vote + one_vote / 16)

    def test_none_as_the_correct_answer_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no answer"):
            majority_at_n([None], None, 1)


class TestExpectedValueOfSelected:
    REWARDS = (0.0, 1.0, 0.5, -1.0, 2.0, 0.2)
    VALUES = (1.0, 0.0, 1.0, 1.0, 0.0, 1.0)

    @pytest.mark.parametrize("n", range(1, 7))
    def test_with_few_subsets_the_value_is_exact(self, n: int) -> None:
        exact = expected_value_of_best(self.REWARDS, self.VALUES, n)
        assert expected_value_of_selected(
            scored(self.REWARDS), dict(enumerate(self.VALUES)), n, argmax
        ) == pytest.approx(exact)

    def test_weighted_majority_worked_by_hand(self) -> None:
        # Answers a, b, a weigh 1, 2, 1.5, and a is right. Both pairs with b go to b, {a,a} to a, all three to a.
        pool = scored([0.0, math.log(2), math.log(1.5)])
        values, answers = {0: 1.0, 1: 0.0, 2: 1.0}, {0: "a", 1: "b", 2: "a"}
        at_n = [
            expected_value_of_selected(pool, values, n, lambda drawn: weighted_majority(drawn, answers))
            for n in (1, 2, 3)
        ]
        assert at_n == pytest.approx([2 / 3, 1 / 3, 1.0])

    def test_many_subsets_are_sampled_with_the_seed(self) -> None:
        def estimate(seed: int) -> float:
            return expected_value_of_selected(
                scored(self.REWARDS), dict(enumerate(self.VALUES)), 3, argmax, draws=19, seed=seed
            )

        assert estimate(1) == estimate(1)
        assert len({estimate(seed) for seed in range(10)}) > 1
        exact = expected_value_of_best(self.REWARDS, self.VALUES, 3)
        assert fmean(estimate(seed) for seed in range(200)) == pytest.approx(exact, abs=0.03)


class TestBootstrap:
    def test_equal_values_have_an_interval_of_width_zero(self) -> None:
        interval = bootstrap_mean([0.5] * 10)
        assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)

    def test_the_interval_agrees_with_the_normal_approximation_of_a_binomial(self) -> None:
        # 30 of 100: .3 ± 1.96 · √(.3 · .7 / 100) = .3 ± .0898; the bootstrap moves in steps of .01.
        interval = bootstrap_mean([1.0] * 30 + [0.0] * 70)
        assert interval.mean == pytest.approx(0.3)
        assert [interval.low, interval.high] == pytest.approx([0.21, 0.39], abs=0.011)

    def test_the_seed_determines_the_interval(self) -> None:
        random = Random(1)
        values = [random.gauss(0, 1) for _ in range(20)]
        assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
        assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)

    def test_the_mean_of_no_prompts_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no prompts"):
            bootstrap_mean([])


POLICY, REWARDS = (0.4, 0.3, 0.2, 0.1), (1.0, 2.0, 3.0, 4.0)


def returned_by(rule: Callable[[tuple[int, ...]], int], n: int) -> list[float]:
    """The distribution of what a rule returns from n samples of POLICY, over every outcome of the n."""
    returned: defaultdict[int, float] = defaultdict(float)
    for drawn in product(range(len(POLICY)), repeat=n):
        returned[rule(drawn)] += math.prod(POLICY[answer] for answer in drawn)
    return [returned[answer] for answer in range(len(POLICY))]


class TestKl:
    def test_best_of_four_worked_by_hand(self) -> None:
        # Distribution functions .4, .7, .9, 1 to the fourth: .0256, .2401, .6561, 1; and their differences.
        best = best_of_n_distribution(POLICY, REWARDS, 4)
        assert best == pytest.approx([0.0256, 0.2145, 0.4160, 0.3439])
        assert kl_divergence(best, POLICY) == pytest.approx(0.5871, abs=5e-5)
        assert kl_upper_bound(4) == pytest.approx(0.6363, abs=5e-5)

    @pytest.mark.parametrize("rewards", [REWARDS, (2.0, 1.0, 2.0, 0.0), (0.0, 0.0, 0.0, 0.0)])
    @pytest.mark.parametrize("n", [1, 2, 3, 5])
    def test_the_distribution_is_that_of_every_outcome(self, rewards: tuple[float, ...], n: int) -> None:
        best = returned_by(lambda drawn: max(drawn, key=lambda answer: rewards[answer]), n)  # ties: the first drawn
        assert best_of_n_distribution(POLICY, rewards, n) == pytest.approx(best)

    def test_an_answer_the_policy_never_gives_is_never_returned(self) -> None:
        assert best_of_n_distribution([0.5, 0.5, 0.0], [1.0, 2.0, 3.0], 2) == pytest.approx([0.25, 0.75, 0.0])

    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
    def test_the_bound_holds_for_voting_too(self, n: int) -> None:
        def voted(drawn: tuple[int, ...]) -> int:
            return drawn[majority(scored([NAN] * n), dict(enumerate(drawn))).winner.candidate.index]

        assert kl_divergence(returned_by(voted, n), POLICY) <= kl_upper_bound(n) + 1e-12

    def test_best_of_one_is_the_policy(self) -> None:
        assert kl_upper_bound(1) == 0
        assert best_of_n_distribution(POLICY, REWARDS, 1) == pytest.approx(POLICY)

    def test_bound_worked_by_hand(self) -> None:
        assert kl_upper_bound(2) == pytest.approx(0.693147 - 0.5, abs=1e-6)
        assert kl_upper_bound(16) == pytest.approx(2.772589 - 0.9375, abs=1e-6)

    def test_the_bound_of_no_samples_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one sample"):
            kl_upper_bound(0)

    @pytest.mark.parametrize(("policy", "n"), [((0.5, 0.4), 2), ((0.5, 0.5), 0)])
    def test_an_invalid_policy_or_n_is_refused(self, policy: tuple[float, ...], n: int) -> None:
        with pytest.raises(ValueError, match="sum to 1"):
            best_of_n_distribution(policy, [1.0, 2.0], n)
