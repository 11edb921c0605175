"""When enough has been drawn: pure decisions over the rewards so far, driven by `server.pipeline.sampling`.

    AdaptiveN              draws in waves, and stops when one more candidate is not worth its price
    SpeculativeRejection   scores candidates while they are written, and gives the worst up
    StragglerCut           does not wait for the last ones to finish

None of them knows time, engines or texts: the same rewards in the same order give the same decision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from reranker.reward_posterior import UNKNOWN, Predictive, Prior

WAVE = 4
"""Candidates of a wave. A larger one draws more than was needed, a smaller one takes more rounds, and fills the engine
less in each; docs/stopping.md has both for waves of 1 to 8."""

EPSILON = 1e-9
"""A share of a count that is whole but for rounding is whole: 0.29 of 100 are 29."""


@dataclass(frozen=True, slots=True)
class AdaptiveN:
    """Optimal stopping of best-of-N: as many candidates as are worth their price.

    Drawing candidates of unknown reward at a price each and keeping the best is Pandora's problem with equal boxes
    (Weitzman 1979; for best-of-N: Kalayci, Raman and Dughmi 2025, arXiv 2510.01394). The best rule is to stop as soon
    as the best so far reaches the value τ at which one more is worth just its price, or in other words when

        E[(R − best)⁺] < price

    The distribution of R is not known. The paper takes the upper half of exp(reward) for exponential and raises its
    mean to an upper confidence bound, after 20 samples. Here the rewards of a prompt are taken for normal, and what is
    known of their mean and spread is a `Prior` and the rewards so far (`Predictive`): the less it is, the heavier the
    tails, which is what the bound is for. The prior is what makes it frugal: a few rewards alone tell so little of
    where the best ones are that stopping by them saves nothing over plain best-of-N (docs/stopping.md has both).

    With a `quantile` in place of a price it stops when P(R < best) ≥ quantile: the best is among that share of what the
    policy would write. This knows no unit of reward. A best so far of `target_reward` or more is always enough.

    Without a prior three rewards are drawn before any is judged, and while all are alike, their spread being unknown,
    drawing goes on. Missing rewards (NaN, −∞) count as drawn and say nothing. Between `least` and `most` are drawn.
    """

    most: int
    least: int = 1
    price: float | None = None
    quantile: float | None = None
    target_reward: float | None = None
    wave: int = WAVE
    prior: Prior = UNKNOWN

    def next_wave(self, rewards_N: Sequence[float]) -> int:
        """How many to draw after those with these rewards; 0 to stop."""
        drawn = len(rewards_N)
        if drawn >= self.least and self._is_enough([one for one in rewards_N if one > -math.inf]):  # without NaN too
            return 0
        return min(max(self.wave, self.least - drawn), self.most - drawn)

    def _is_enough(self, rewards: Sequence[float]) -> bool:
        if not rewards:
            return False
        best = max(rewards)
        if best >= (math.inf if self.target_reward is None else self.target_reward):
            return True
        following = Predictive.after(rewards, self.prior)
        if following is None:
            return False
        if self.price is not None and following.gain_over(best) < self.price:
            return True
        return self.quantile is not None and following.above(best) <= 1 - self.quantile


@dataclass(frozen=True, slots=True)
class SpeculativeRejection:
    """Gives up, at each of some lengths, the candidates whose beginnings are worth least.

    The reward of a beginning foretells that of the whole (Sun et al. 2024, arXiv 2410.20290). The paper cuts at a
    quantile of the rewards whenever memory is full. Here it is when every candidate that is still written has reached
    the next of `checkpoints`, in tokens, which does not depend on the machine. Those that have ended are compared too,
    by their whole reward, but there is nothing left of them to give up.
    """

    checkpoints: tuple[int, ...]
    share: float = 0.5
    least: int = 1

    def rejected(self, growing: Mapping[int, float], ended: Sequence[float]) -> list[int]:
        """Of the growing candidates (index -> reward of what there is of them), those to give up.

        They are among the lowest ⌊share · m⌋ of all m that have a reward. A missing reward (NaN) says nothing and gives
        up nobody, ties give up the higher index first, and `least` candidates are left.
        """
        told = [(reward, -index) for index, reward in growing.items() if not math.isnan(reward)]
        told += [(reward, 1) for reward in ended if not math.isnan(reward)]
        lowest = sorted(told)[: int(self.share * len(told) + EPSILON)]
        spare = max(0, len(growing) + len(ended) - self.least)
        return [-place for _, place in lowest if place <= 0][:spare]


@dataclass(frozen=True, slots=True)
class StragglerCut:
    """Stops when the first `share` of the candidates have ended, or one of them has `target_reward`.

    The last ones are the longest, so long answers have less of a chance: a price that the user knows of.
    """

    share: float = 1.0
    target_reward: float | None = None
    least: int = 1

    def is_enough(self, ended_rewards: Sequence[float], drawn: int) -> bool:
        """Whether the rest of the `drawn` need not be waited for; a reward that is still to come is NaN."""
        ended = len(ended_rewards)
        if ended < min(self.least, drawn):
            return False
        if ended / drawn >= self.share:
            return True
        return self.target_reward is not None and any(one >= self.target_reward for one in ended_rewards)


Policy = Literal["adaptive", "speculative_rejection", "adaptive_rejection", "straggler_cut"]


@dataclass(frozen=True, slots=True)
class Stopping:
    """What is decided about one request: how many are drawn, which are given up, and when all the rest is.

    `policy` is its name; None is plain best-of-N.
    """

    policy: Policy | None = None
    waves: AdaptiveN | None = None
    rejection: SpeculativeRejection | None = None
    stragglers: StragglerCut | None = None

    @property
    def gives_up(self) -> bool:
        """Whether candidates under way may be cancelled."""
        return self.rejection is not None or self.stragglers is not None

    def at_once(self, most: int) -> int:
        """So many of at most `most` candidates are under way at the same time."""
        return most if self.waves is None else min(most, max(self.waves.wave, self.waves.least))

    @property
    def reads_rewards(self) -> bool:
        """Whether it decides by rewards, which then have to be there before the last candidate is."""
        by_target = self.stragglers is not None and self.stragglers.target_reward is not None
        return self.waves is not None or self.rejection is not None or by_target
