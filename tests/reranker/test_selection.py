"""Selection strategies over few candidates, so that every expected value can be computed by hand."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker.candidate import Candidate, ScoredCandidate, Selection
from reranker.selection import argmax, by_index, by_logprob, majority, mbr, soft, trigram_similarity, weighted_majority

NAN = math.nan


def scored(*rewards: float) -> list[ScoredCandidate]:
    return [ScoredCandidate(Candidate(index, f"text {index}", 3), reward) for index, reward in enumerate(rewards)]


def texts(*pairs: tuple[str, float]) -> list[ScoredCandidate]:
    return [ScoredCandidate(Candidate(index, text, 3), reward) for index, (text, reward) in enumerate(pairs)]


def votes(answers: str) -> dict[int, str]:
    """The answers of candidates, one letter each; - stands for no answer."""
    return {index: answer for index, answer in enumerate(answers) if answer != "-"}


def order(selection: Selection) -> list[int]:
    return [scored.candidate.index for scored in selection.ranking]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        pytest.param((0.1, 0.9, 0.5), [1, 2, 0], id="highest reward wins"),
        pytest.param((0.5, 0.9, 0.9), [1, 2, 0], id="ties go to the lowest index"),
        pytest.param((NAN, -7.0, NAN), [1, 0, 2], id="NaN never wins"),
        pytest.param((NAN, NAN, NAN), [0, 1, 2], id="all NaN keep their order"),
        pytest.param((-math.inf, NAN, math.inf), [2, 0, 1], id="infinities compare, NaN comes after them"),
        pytest.param((0.0, -0.0, 0.0), [0, 1, 2], id="zero has no sign"),
    ],
)
def test_argmax(rewards: tuple[float, ...], expected: list[int]) -> None:
    assert order(argmax(scored(*rewards))) == expected


@given(st.lists(st.floats(allow_nan=True), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_argmax_does_not_depend_on_the_order_of_arrival(rewards: list[float], random: Random) -> None:
    arrived = scored(*rewards)
    shuffled = arrived.copy()
    random.shuffle(shuffled)
    assert order(argmax(shuffled)) == order(argmax(arrived))


def test_by_logprob_ranks_by_the_mean_per_token_and_not_the_sum() -> None:
    # Sums -3, -4 and unknown; means -1.0 (three tokens) and -0.5 (eight tokens).
    short = Candidate(0, "short", 3, cumulative_logprob=-3.0)
    long = Candidate(1, "long", 8, cumulative_logprob=-4.0)
    unknown = Candidate(2, "unknown", 5)
    selection = by_logprob([ScoredCandidate(candidate, NAN) for candidate in (unknown, short, long)])
    assert order(selection) == [1, 0, 2]


def test_by_index_is_the_order_of_drawing() -> None:
    assert order(by_index(reversed(scored(1.0, 3.0, 2.0)))) == [0, 1, 2]


class TestMajority:
    """Answers of five candidates; rewards are ignored."""

    @pytest.mark.parametrize(
        ("answers", "expected"),
        [
            pytest.param("abbca", [0, 1, 2, 4, 3], id="a and b tie at two votes: lowest index first, c last"),
            pytest.param("abbcb", [1, 2, 4, 0, 3], id="three votes for b"),
            pytest.param("-aab-", [1, 2, 3, 0, 4], id="no answer comes last"),
            pytest.param("----a", [4, 0, 1, 2, 3], id="one answer beats none"),
        ],
    )
    def test_the_answer_with_most_votes_is_first(self, answers: str, expected: list[int]) -> None:
        assert order(majority(scored(9.0, NAN, 0.0, 5.0, 7.0), votes(answers))) == expected

    def test_without_a_vote_it_is_argmax(self) -> None:
        assert order(majority(scored(1.0, 3.0, 2.0), {})) == [1, 2, 0]


class TestWeightedMajority:
    LN2 = math.log(2)

    def test_worked_by_hand(self) -> None:
        # Rewards 0, ln 2, ln 3 weigh 1, 2, 3 (over 3). a has 1 + 2 = 3, b has 3: a tie, which the higher reward wins.
        # One more vote of weight 1 for a decides for a, and in it the candidate of reward ln 2 stands first.
        rewards = (0.0, self.LN2, math.log(3))
        assert order(weighted_majority(scored(*rewards), votes("aab"))) == [2, 1, 0]
        assert order(weighted_majority(scored(*rewards, 0.0), votes("aaba"))) == [1, 0, 3, 2]

    def test_a_rising_temperature_changes_argmax_to_majority(self) -> None:
        # Two votes of reward 0 against one of reward 1: 2·exp(-1/T) against 1, even at T = 1/ln 2.
        pool, answers = scored(0.0, 1.0, 0.0), votes("aba")
        assert order(weighted_majority(pool, answers, 0.9 / self.LN2))[0] == 1
        assert order(weighted_majority(pool, answers, 1.1 / self.LN2))[0] == 0

    @pytest.mark.parametrize("shift", [-1000.0, 1000.0])
    def test_a_shift_of_all_rewards_changes_nothing(self, shift: float) -> None:
        rewards = (0.5, 1.25, 0.75, -2.0)
        moved = tuple(reward + shift for reward in rewards)
        assert order(weighted_majority(scored(*moved), votes("abac"))) == order(
            weighted_majority(scored(*rewards), votes("abac"))
        )

    def test_a_missing_reward_has_no_vote_and_comes_last(self) -> None:
        assert order(weighted_majority(scored(NAN, 0.0, NAN, 0.5, 0.1), votes("aaab-"))) == [3, 1, 4, 0, 2]

    def test_a_candidate_without_an_answer_ranks_below_all_with_one(self) -> None:
        assert order(weighted_majority(scored(9.0, -math.inf, 0.0), votes("-ab"))) == [2, 1, 0]

    def test_without_a_vote_it_is_argmax(self) -> None:
        assert order(weighted_majority(scored(1.0, NAN, 2.0), votes("-a-"))) == [2, 0, 1]


class TestSoft:
    def test_the_winner_is_drawn_in_proportion_to_the_exponential(self) -> None:
        # exp(r/T) is 1, 2, 4: probabilities 1/7, 2/7, 4/7. Over 4,000 seeds the standard error is at most .008;
        # the seeds are fixed, so this does not fail by luck.
        rewards = scored(0.0, 2 * math.log(2), 4 * math.log(2))
        winners = Counter(order(soft(rewards, temperature=2.0, seed=seed))[0] for seed in range(4000))
        assert [winners[index] / 4000 for index in range(3)] == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.02)

    def test_the_second_is_drawn_from_the_remaining_candidates(self) -> None:
        # Where 2 (weight 4) has won, 0 and 1 are left with weights 1 and 2.
        rewards = scored(0.0, math.log(2), math.log(4))
        orders = [order(soft(rewards, temperature=1.0, seed=seed)) for seed in range(4000)]
        seconds = Counter(second for first, second, _ in orders if first == 2)
        assert seconds[1] / (seconds[0] + seconds[1]) == pytest.approx(2 / 3, abs=0.03)

    def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_arrival(self) -> None:
        pool = scored(0.1, 0.2, 0.3, 0.4)
        assert order(soft(pool, 1.0, seed=5)) == order(soft(pool[::-1], 1.0, seed=5))
        assert len({tuple(order(soft(pool, 1.0, seed=seed))) for seed in range(50)}) > 1

    def test_a_failed_candidate_does_not_change_the_draw_of_the_others(self) -> None:
        pool = scored(0.1, 0.2, 0.3, 0.4)
        for seed in range(20):
            without = [index for index in order(soft(pool, 1.0, seed)) if index != 1]
            assert order(soft([pool[0], *pool[2:]], 1.0, seed)) == without

    @pytest.mark.parametrize("rewards", [(0.0, 1.0, -1.0), (-math.inf, math.inf, 5.0), (1e300, 1.1e300, 0.0)])
    def test_near_temperature_zero_it_is_argmax(self, rewards: tuple[float, ...]) -> None:
        assert order(soft(scored(*rewards), 1e-12, seed=1))[0] == 1

    def test_a_missing_reward_is_never_drawn(self) -> None:
        assert all(order(soft(scored(NAN, -50.0, NAN), 1.0, seed))[0] == 1 for seed in range(50))


class TestMbr:
    def test_worked_by_hand(self) -> None:
        # Trigrams {abc, bcd}, {abc, bce}, {xyz}: similarity of the first two 2·1/4 = .5, of the third to both 0.
        # Closeness to all three, itself included: (1 + .5)/3 = .5, .5, 1/3. So the lead of .1 that the third has in
        # reward is lost at beta 1 (1.1 + 1/3 < 1 + 1/2) and kept at beta .5 (1.1 + 1/6 > 1 + 1/4).
        pool = texts(("abcd", 1.0), ("abce", 1.0), ("xyz", 1.1))
        assert order(mbr(pool, beta=1.0)) == [0, 1, 2]
        assert order(mbr(pool, beta=0.5)) == [2, 0, 1]

    def test_a_candidate_without_a_reward_never_wins_but_counts_for_closeness(self) -> None:
        pool = texts(("xyz", 0.0), ("abcd", 0.0), ("abcd", NAN))
        assert order(mbr(pool)) == [1, 0, 2]

    @given(st.lists(st.floats(allow_nan=True), min_size=1, max_size=8))
    def test_with_beta_zero_it_is_argmax(self, rewards: list[float]) -> None:
        assert order(mbr(scored(*rewards), beta=0.0)) == order(argmax(scored(*rewards)))


@given(st.lists(st.tuples(st.floats(allow_nan=True), st.sampled_from("ab-")), min_size=1, max_size=12), st.randoms())
def test_no_strategy_lets_a_missing_reward_win_or_depends_on_the_order_of_arrival(
    pool: list[tuple[float, str]], random: Random
) -> None:
    arrived = scored(*(reward for reward, _ in pool))
    shuffled = arrived.copy()
    random.shuffle(shuffled)
    answers = votes("".join(answer for _, answer in pool))
    for strategy in (
        argmax,
        mbr,
        lambda scored: soft(scored, 0.5, seed=3),
        lambda scored: weighted_majority(scored, answers, 0.5),
    ):
        ranking = strategy(arrived).ranking
        assert order(strategy(shuffled)) == order(strategy(arrived))
        assert [sample.has_reward for sample in ranking] == sorted(
            (sample.has_reward for sample in ranking), reverse=True
        )
    assert order(majority(shuffled, answers)) == order(majority(arrived, answers))


def test_trigram_similarity_worked_by_hand() -> None:
    # {abc, bcd} and {abc, bce} share one of two; case and white space do not count; an empty text equals only itself.
    assert trigram_similarity(["abcd", "ABCE", "", "ab", "a  b c", "a b\nc"]) == [
        [1, 0.5, 0, 0, 0, 0],
        [0.5, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
