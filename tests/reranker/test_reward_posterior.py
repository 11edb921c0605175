"""What the next reward will be, by numbers worked out by hand, and the prior found again in rewards made by it."""

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranker.reward_posterior import MAX_WEIGHT, UNKNOWN, Predictive, Prior, t_above, t_density

PATIENT = settings(deadline=None)


def after(rewards: Sequence[float], prior: Prior = UNKNOWN) -> Predictive:
    following = Predictive.after(rewards, prior)
    assert following is not None
    return following


class TestStudent:
    """One degree of freedom is Cauchy's distribution; with two, P(T > t) = (1 − t/√(2 + t²))/2."""

    def test_the_upper_tail_by_hand(self) -> None:
        assert t_above(1, freedom=1) == pytest.approx(1 / 4)
        assert t_above(1, freedom=2) == pytest.approx((1 - 1 / math.sqrt(3)) / 2)
        assert t_above(-1, freedom=2) == pytest.approx((1 + 1 / math.sqrt(3)) / 2)

    @pytest.mark.parametrize(("freedom", "t"), [(3, 2.353), (4, 2.132), (9, 1.833), (10, 1.812), (30, 1.697)])
    def test_the_table_s_95_percent_points(self, freedom: int, t: float) -> None:
        assert t_above(t, freedom) == pytest.approx(0.05, abs=5e-5)

    def test_many_degrees_are_nearly_normal(self) -> None:
        assert t_above(1.5, freedom=4000) == pytest.approx(math.erfc(1.5 / math.sqrt(2)) / 2, abs=1e-4)

    def test_a_rounding_error_makes_no_probability_above_one(self) -> None:
        assert t_above(-20, freedom=52) == 1.0

    @pytest.mark.parametrize("freedom", [1, 2, 3, 8, 63])
    def test_the_density_is_the_tail_s_slope(self, freedom: int) -> None:
        slope = (t_above(0.7 - 1e-5, freedom) - t_above(0.7 + 1e-5, freedom)) / 2e-5
        assert t_density(0.7, freedom) == pytest.approx(slope, rel=1e-6)


class TestPredictive:
    """After 0, 1, 2: mean 1, standard deviation 1, so the next is 1 + √(4/3)·T with two degrees of freedom."""

    def test_after_three_rewards(self) -> None:
        following = after([0, 1, 2])
        assert (following.location, following.freedom) == (1, 2)
        assert following.scale == pytest.approx(math.sqrt(4 / 3))

    def test_the_gain_over_the_best(self) -> None:
        # With two degrees of freedom E[(T − z)⁺] = (√(2 + z²) − z)/2, here at z = 1/√(4/3) = √0.75.
        by_hand = math.sqrt(4 / 3) * (math.sqrt(2.75) - math.sqrt(0.75)) / 2
        assert by_hand == pytest.approx(0.4574, abs=1e-4)
        assert after([0, 1, 2]).gain_over(2) == pytest.approx(by_hand)

    @PATIENT
    @given(st.integers(2, 63), st.floats(-4, 4))
    def test_the_gain_falls_by_the_chance_of_more(self, freedom: int, best: float) -> None:
        """d/dx E[(R − x)⁺] = −P(R > x), whatever the distribution."""
        following = Predictive(0.5, 2.0, freedom)
        slope = (following.gain_over(best + 1e-4) - following.gain_over(best - 1e-4)) / 2e-4
        assert slope == pytest.approx(-following.above(best), abs=1e-6)

    def test_far_above_everything_there_is_nothing_to_gain(self) -> None:
        assert 0 <= Predictive(0.0, 1.0, 60).gain_over(50.0) < 1e-12

    def test_two_rewards_or_equal_ones_say_too_little(self) -> None:
        assert Predictive.after([0, 1]) is None
        assert Predictive.after([1, 1, 1, 1]) is None

    def test_a_prior_counts_as_rewards_that_were_seen(self) -> None:
        # Mean 10 of weight 2 and deviation 3 of weight 4, then 4: k = 3, location (2·10 + 4)/3 = 8, ν = 5,
        # squares 4·9 + 0 + 2·1/3·36 = 60, scale² = 60/5·(1 + 1/3) = 16.
        following = after([4], Prior(mean=10, mean_weight=2, sd=3, sd_weight=4))
        assert (following.location, following.freedom) == (8, 5)
        assert following.scale == pytest.approx(4)

    def test_a_prior_alone_tells_the_first_reward(self) -> None:
        following = after([], Prior(mean=10, mean_weight=2, sd=4, sd_weight=4))
        assert (following.location, following.freedom) == (10, 4)
        assert following.scale == pytest.approx(4 * math.sqrt(1.5))


class TestPriorOf:
    def test_it_is_found_again_in_what_it_made(self) -> None:
        """4000 prompts of 8: the mean within 4 standard errors, the weights within a tenth and a fifth."""
        source = random.Random(3)
        made = Prior(mean=2.0, mean_weight=4.0, sd=1.5, sd_weight=12)
        pools = []
        for _ in range(4000):
            sd = made.sd * math.sqrt(made.sd_weight / source.gammavariate(made.sd_weight / 2, 2))
            mean = source.gauss(made.mean, sd / math.sqrt(made.mean_weight))
            pools.append([source.gauss(mean, sd) for _ in range(8)])
        found = Prior.of(pools)
        assert found.mean == pytest.approx(made.mean, abs=4 * 0.9 / math.sqrt(4000))
        assert found.sd == pytest.approx(made.sd, rel=0.03)
        assert found.mean_weight == pytest.approx(made.mean_weight, rel=0.1)
        assert found.sd_weight == pytest.approx(made.sd_weight, rel=0.2)

    def test_prompts_that_are_all_alike_leave_nothing_to_learn(self) -> None:
        found = Prior.of([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
        assert found == Prior(mean=1.0, mean_weight=MAX_WEIGHT, sd=math.sqrt(1 - 2 / MAX_WEIGHT), sd_weight=MAX_WEIGHT)

    @pytest.mark.parametrize("pools", [[], [[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[2.0, 2.0], [1.0, 1.0]]])
    def test_too_little_is_refused(self, pools: list[list[float]]) -> None:
        with pytest.raises(ValueError, match="two prompts"):
            Prior.of(pools)

    @PATIENT
    @given(st.lists(st.lists(st.integers(-99, 99).map(float), min_size=2, max_size=9), min_size=2, max_size=9))
    def test_whatever_it_finds_can_be_used(self, pools: list[list[float]]) -> None:
        if any(max(pool) > min(pool) for pool in pools):
            following = after([1.0, 2.0], Prior.of(pools))
            assert math.isfinite(following.gain_over(2.0))
            assert 0 <= following.above(2.0) <= 1
