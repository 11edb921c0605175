"""When enough has been drawn, by numbers worked out by hand, and by what must hold for any rewards."""

import math
import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranker.reward_posterior import Predictive, Prior
from reranker.stopping import AdaptiveN, SpeculativeRejection, StragglerCut

NAN = math.nan
PATIENT = settings(deadline=None)
REWARDS = st.lists(st.integers(-1000, 1000).map(float), max_size=40)


class TestAdaptiveN:
    """After 0, 1, 2 one more is expected to raise the best by 0.457 and does so with a probability of 0.239."""

    @pytest.mark.parametrize(("price", "wave"), [(0.45, 4), (0.46, 0)])
    def test_it_stops_when_one_more_is_not_worth_its_price(self, price: float, wave: int) -> None:
        assert AdaptiveN(most=16, price=price).next_wave([0, 1, 2]) == wave

    @pytest.mark.parametrize(("quantile", "wave"), [(0.77, 4), (0.76, 0)])
    def test_it_stops_at_the_quantile(self, quantile: float, wave: int) -> None:
        assert AdaptiveN(most=16, quantile=quantile).next_wave([0, 1, 2]) == wave

    def test_two_rewards_are_too_few_to_judge(self) -> None:
        assert AdaptiveN(most=16, price=1e9, wave=1).next_wave([0, 1]) == 1

    def test_with_a_prior_the_first_reward_can_be_enough(self) -> None:
        policy = AdaptiveN(most=16, price=0.1, prior=Prior(mean=0.0, mean_weight=9, sd=1.0, sd_weight=9))
        assert policy.next_wave([]) == 4
        assert policy.next_wave([0.0]) == 4  # a gain of about 0.4 deviations is to be had
        assert policy.next_wave([3.0]) == 0

    def test_missing_rewards_are_drawn_but_say_nothing(self) -> None:
        assert AdaptiveN(most=16, price=0.46).next_wave([NAN, 0, 1]) == 4
        assert AdaptiveN(most=16, price=0.46).next_wave([NAN, 0, 1, 2]) == 0

    def test_of_equal_rewards_the_spread_is_unknown(self) -> None:
        assert AdaptiveN(most=16, price=1e9).next_wave([1.0] * 8) == 4

    def test_the_target_is_always_enough(self) -> None:
        assert AdaptiveN(most=16, price=1e-9, target_reward=1).next_wave([0, 1]) == 0
        assert AdaptiveN(most=16, price=1e-9, target_reward=1).next_wave([0, 0.9]) == 4

    def test_infinite_rewards(self) -> None:
        assert AdaptiveN(most=16, price=1e-9).next_wave([0, math.inf]) == 0
        assert AdaptiveN(most=16, price=0.46).next_wave([-math.inf, 0, 1]) == 4
        assert AdaptiveN(most=16, price=0.46).next_wave([1e300, -1e300, 0, 1]) == 4

    def test_the_last_wave_is_what_is_left(self) -> None:
        assert AdaptiveN(most=6, price=1e-9).next_wave([0, 1, 2, 3]) == 2
        assert AdaptiveN(most=4, price=1e-9).next_wave([0, 1, 2, 3]) == 0

    def test_choices_that_were_asked_for_are_drawn(self) -> None:
        assert AdaptiveN(most=16, least=7, price=1e9).next_wave([]) == 7
        assert AdaptiveN(most=16, least=7, price=1e9).next_wave([0, 1, 2, 3, 4, 5]) == 4

    def test_the_price_of_sixteen(self) -> None:
        """Of normal rewards the best of 16 is 1.77 deviations above the mean, as is the mean of those above 1.35.

        So at the gain of one more over 1.35 deviations, 0.04, that is where drawing should stop.
        """
        known = Predictive(0.0, 1.0, 10_000)
        assert known.gain_over(1.35) == pytest.approx(0.041, abs=1e-3)

    @PATIENT
    @given(REWARDS, st.floats(1e-3, 1e3), st.integers(1, 64), st.integers(1, 9))
    def test_never_more_than_the_most(self, rewards: list[float], price: float, most: int, wave: int) -> None:
        drawn = rewards[:most]
        assert 0 <= AdaptiveN(most, price=price, wave=wave).next_wave(drawn) <= min(wave, most - len(drawn))

    @PATIENT
    @given(REWARDS, st.floats(1e-3, 1e3), st.floats(1, 100))
    def test_a_higher_price_stops_no_later(self, rewards: list[float], price: float, times: float) -> None:
        if AdaptiveN(64, price=price).next_wave(rewards) == 0:
            assert AdaptiveN(64, price=price * times).next_wave(rewards) == 0

    @PATIENT
    @given(REWARDS, st.floats(1e-3, 1e3))
    def test_the_unit_does_not_matter(self, rewards: list[float], price: float) -> None:
        """Doubling is exact in floating point."""
        doubled = [2 * one for one in rewards]
        assert AdaptiveN(64, price=price).next_wave(rewards) == AdaptiveN(64, price=2 * price).next_wave(doubled)
        assert AdaptiveN(64, quantile=0.9).next_wave(rewards) == AdaptiveN(64, quantile=0.9).next_wave(doubled)

    @PATIENT
    @given(REWARDS.filter(lambda some: len(some) < 60), st.integers(1, 4), st.floats(1e-3, 1e3))
    def test_missing_rewards_change_no_judgement(self, rewards: list[float], missing: int, price: float) -> None:
        policy = AdaptiveN(64, price=price, wave=1)
        if rewards:
            assert policy.next_wave(rewards + [NAN] * missing) == policy.next_wave(rewards)


class TestSpeculativeRejection:
    def test_the_worst_half_is_given_up(self) -> None:
        policy = SpeculativeRejection((8,), share=0.5)
        assert sorted(policy.rejected({0: 0.1, 1: 0.9, 2: -3.0, 3: 0.2}, [])) == [0, 2]

    def test_the_share_is_rounded_down(self) -> None:
        assert SpeculativeRejection((8,), share=0.5).rejected({0: 0.0, 1: 1.0, 2: 2.0}, []) == [0]
        assert SpeculativeRejection((8,), share=0.9).rejected({4: 0.0}, []) == []

    def test_rounding_takes_nothing_from_the_share(self) -> None:
        growing = dict(enumerate(map(float, range(100))))
        assert len(SpeculativeRejection((8,), share=0.29).rejected(growing, [])) == 29  # 0.29 * 100 is 28.999…
        assert StragglerCut(share=0.55).is_enough([NAN] * 11, drawn=20)  # 0.55 * 20 is 11.000…2

    def test_those_that_have_ended_are_compared_too(self) -> None:
        policy = SpeculativeRejection((8,), share=0.5)
        # Of 0, 1, 2, 3 the lower half is 0 and 1: one of them still grows, and both of them do.
        assert policy.rejected({0: 1.0, 1: 3.0}, [0.0, 2.0]) == [0]
        assert sorted(policy.rejected({0: 1.0, 1: 0.0}, [2.0, 3.0])) == [0, 1]

    def test_of_ties_the_lower_index_stays(self) -> None:
        assert SpeculativeRejection((8,), share=0.5).rejected({0: 1.0, 1: 1.0}, []) == [1]
        assert SpeculativeRejection((8,), share=0.5).rejected({0: 1.0}, [1.0]) == [0]

    def test_a_missing_reward_gives_up_nobody(self) -> None:
        policy = SpeculativeRejection((8,), share=0.5)
        assert policy.rejected({0: NAN, 1: 1.0, 2: 2.0}, [NAN]) == [1]
        assert policy.rejected({0: NAN, 1: NAN}, []) == []

    def test_the_choices_that_were_asked_for_are_left(self) -> None:
        assert len(SpeculativeRejection((8,), share=0.75, least=3).rejected(dict(enumerate([0.0, 1, 2, 3])), [])) == 1

    @PATIENT
    @given(
        st.dictionaries(st.integers(0, 63), st.integers(-9, 9).map(float), min_size=1),
        st.lists(st.integers(-9, 9).map(float), max_size=8),
        st.floats(0.01, 0.99),
        st.integers(1, 4),
    )
    def test_nobody_given_up_is_better_than_one_who_stays(
        self, growing: dict[int, float], ended: list[float], share: float, least: int
    ) -> None:
        given_up = SpeculativeRejection((8,), share=share, least=least).rejected(growing, ended)
        stays = growing.keys() - set(given_up)
        assert len(set(given_up)) == len(given_up) <= share * (len(growing) + len(ended))
        assert len(stays) + len(ended) >= min(least, len(growing) + len(ended))
        assert all(growing[lost] <= growing[kept] for lost in given_up for kept in stays)


class TestStragglerCut:
    def test_the_first_share_is_waited_for(self) -> None:
        cut = StragglerCut(share=0.75)
        assert [cut.is_enough([NAN] * ended, drawn=8) for ended in (5, 6, 7)] == [False, True, True]

    def test_a_part_of_a_candidate_is_a_whole_one(self) -> None:
        assert [StragglerCut(share=0.5).is_enough([NAN] * ended, drawn=3) for ended in (1, 2)] == [False, True]

    def test_one_at_the_target_is_enough(self) -> None:
        assert StragglerCut(target_reward=1.0).is_enough([0.0, NAN, 1.0], drawn=8)
        assert not StragglerCut(target_reward=1.0).is_enough([0.0, NAN, 0.9], drawn=8)

    def test_the_choices_that_were_asked_for_are_waited_for(self) -> None:
        assert not StragglerCut(target_reward=1.0, least=2).is_enough([1.0], drawn=8)
        assert StragglerCut(target_reward=1.0, least=2).is_enough([1.0, 0.0], drawn=8)


def test_what_is_known_beforehand_makes_it_frugal() -> None:
    """On made normal rewards whose spread is known: the best of 16 for three quarters of the candidates.

    The best of 16 is 1.766 deviations above the mean. Over 4000 prompts the standard error is 0.01, that of the
    candidates 0.15.
    """
    source = random.Random(5)
    policy = AdaptiveN(most=64, price=0.039, prior=Prior(0.0, 1000, 1.0, 1000), wave=1)
    best, drawn = [], []
    for _ in range(4000):
        rewards: list[float] = []
        while wave := policy.next_wave(rewards):
            rewards += [source.gauss(0, 1) for _ in range(wave)]
        best.append(max(rewards))
        drawn.append(len(rewards))
    assert fmean(best) > 1.766
    assert fmean(drawn) < 12
