"""The predictive distribution against numbers computed by hand, and the prior estimated from simulated rewards."""

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranker.reward_posterior import MAX_WEIGHT, UNKNOWN, Predictive, Prior, t_above, t_density

WITHOUT_DEADLINE = settings(deadline=None)


def after(rewards: Sequence[float], prior: Prior = UNKNOWN) -> Predictive:
    following = Predictive.after(rewards, prior)
    assert following is not None
    return following


class TestStudent:
    """One degree of freedom is Cauchy's distribution; with two, P(T > t) = (1 − t/√(2 + t²))/2."""

    def test_the_upper_tail_worked_by_hand(self) -> None:
        assert t_above(1, freedom=1) == pytest.approx(1 / 4)
        assert t_above(1, freedom=2) == pytest.approx((1 - 1 / math.sqrt(3)) / 2)
        assert t_above(-1, freedom=2) == pytest.approx((1 + 1 / math.sqrt(3)) / 2)

    @pytest.mark.parametrize(("freedom", "t"), [(3, 2.353), (4, 2.132), (9, 1.833), (10, 1.812), (30, 1.697)])
    def test_the_tail_at_the_95_percent_points_of_a_table(self, freedom: int, t: float) -> None:
        assert t_above(t, freedom) == pytest.approx(0.05, abs=5e-5)

    def test_with_many_degrees_of_freedom_it_is_nearly_normal(self) -> None:
        assert t_above(1.5, freedom=4000) == pytest.approx(math.erfc(1.5 / math.sqrt(2)) / 2, abs=1e-4)

    def test_a_probability_is_never_above_one_by_rounding(self) -> None:
        assert t_above(-20, freedom=52) == 1.0

    @pytest.mark.parametrize("freedom", [1, 2, 3, 8, 63])
    def test_the_density_is_the_negative_slope_of_the_tail(self, freedom: int) -> None:
        slope = (t_above(0.7 - 1e-5, freedom) - t_above(0.7 + 1e-5, freedom)) / 2e-5
        assert t_density(0.7, freedom) == pytest.approx(slope, rel=1e-6)


class TestPredictive:
    """After 0, 1, 2: mean 1, standard deviation 1, so the next is 1 + √(4/3)·T with two degrees of freedom."""

    def test_the_distribution_after_three_rewards(self) -> None:
        following = after([0, 1, 2])
        assert (following.location, following.freedom) == (1, 2)
        assert following.scale == pytest.approx(math.sqrt(4 / 3))

    def test_the_gain_over_the_best_worked_by_hand(self) -> None:
        # With two degrees of freedom E[(T − z)⁺] = (√(2 + z²) − z)/2, here at z = 1/√(4/3) = √0.75.
        by_hand = math.sqrt(4 / 3) * (math.sqrt(2.75) - math.sqrt(0.75)) / 2
        assert by_hand == pytest.approx(0.4574, abs=1e-4)
        assert after([0, 1, 2]).gain_over(2) == pytest.approx(by_hand)

    @WITHOUT_DEADLINE
    @given(st.integers(2, 63), st.floats(-4, 4))
    def test_the_slope_of_the_gain_is_the_negative_tail(self, freedom: int, best: float) -> None:
        """d/dx E[(R − x)⁺] = −P(R > x), whatever the distribution."""
        following = Predictive(0.5, 2.0, freedom)
        slope = (following.gain_over(best + 1e-4) - following.gain_over(best - 1e-4)) / 2e-4
        assert slope == pytest.approx(-following.above(best), abs=1e-6)

    def test_far_above_all_rewards_the_gain_is_zero(self) -> None:
        assert 0 <= Predictive(0.0, 1.0, 60).gain_over(50.0) < 1e-12

    def test_two_rewards_or_equal_ones_give_no_distribution(self) -> None:
        assert Predictive.after([0, 1]) is None
        assert Predictive.after([1, 1, 1, 1]) is None

    def test_a_prior_counts_as_observed_rewards(self) -> None:
        # Mean 10 of weight 2 and deviation 3 of weight 4, then 4: k = 3, location (2·10 + 4)/3 = 8, ν = 5,
        # squares 4·9 + 0 + 2·1/3·36 = 60, scale² = 60/5·(1 + 1/3) = 16.
        following = after([4], Prior(mean=10, mean_weight=2, sd=3, sd_weight=4))
        assert (following.location, following.freedom) == (8, 5)
        assert following.scale == pytest.approx(4)

    def test_a_prior_alone_predicts_the_first_reward(self) -> None:
        following = after([], Prior(mean=10, mean_weight=2, sd=4, sd_weight=4))
        assert (following.location, following.freedom) == (10, 4)
        assert following.scale == pytest.approx(4 * math.sqrt(1.5))


class TestPriorOf:
    def test_a_prior_is_recovered_from_rewards_simulated_with_it(self) -> None:
        """4000 prompts of 8 rewards: the mean within 4 standard errors, the weights within a tenth and a fifth."""
        source = random.Random(3)
        true_prior = Prior(mean=2.0, mean_weight=4.0, sd=1.5, sd_weight=12)
        pools = []
        for _ in range(4000):
            sd = true_prior.sd * math.sqrt(true_prior.sd_weight / source.gammavariate(true_prior.sd_weight / 2, 2))
            mean = source.gauss(true_prior.mean, sd / math.sqrt(true_prior.mean_weight))
            pools.append([source.gauss(mean, sd) for _ in range(8)])
        estimated = Prior.of(pools)
        assert estimated.mean == pytest.approx(true_prior.mean, abs=4 * 0.9 / math.sqrt(4000))
        assert estimated.sd == pytest.approx(true_prior.sd, rel=0.03)
        assert estimated.mean_weight == pytest.approx(true_prior.mean_weight, rel=0.1)
        assert estimated.sd_weight == pytest.approx(true_prior.sd_weight, rel=0.2)

    def test_prompts_that_do_not_differ_give_the_largest_weights(self) -> None:
        estimated = Prior.of([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
        assert estimated == Prior(
            mean=1.0, mean_weight=MAX_WEIGHT, sd=math.sqrt(1 - 2 / MAX_WEIGHT), sd_weight=MAX_WEIGHT
        )

    @pytest.mark.parametrize("pools", [[], [[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[2.0, 2.0], [1.0, 1.0]]])
    def test_too_few_rewards_are_refused(self, pools: list[list[float]]) -> None:
        with pytest.raises(ValueError, match="two prompts"):
            Prior.of(pools)

    @WITHOUT_DEADLINE
    @given(st.lists(st.lists(st.integers(-99, 99).map(float), min_size=2, max_size=9), min_size=2, max_size=9))
    def test_every_estimated_prior_gives_finite_predictions(self, pools: list[list[float]]) -> None:
        if any(max(pool) > min(pool) for pool in pools):
            following = after([1.0, 2.0], Prior.of(pools))
            assert math.isfinite(following.gain_over(2.0))
            assert 0 <= following.above(2.0) <= 1
