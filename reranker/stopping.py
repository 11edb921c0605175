"""Stopping policies: pure decisions, from the rewards so far, about how many candidates to draw and which to cancel.

    AdaptiveN              draws in waves, and stops when one more candidate is not worth its price
    SpeculativeRejection   scores candidates while they are generated, and cancels the worst
    StragglerCut           does not wait for the last candidates to finish

`server.pipeline.sampling` applies them. They do not depend on time, engines or texts: the same rewards in the same
order give the same decision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from reranker.reward_posterior import UNKNOWN, Predictive, Prior

WAVE = 4
"""Candidates per wave. A larger wave draws more candidates than needed. A smaller one takes more rounds and fills the
engine less in each round. docs/stopping.md shows both effects for waves of 1 to 8."""

EPSILON = 1e-9
"""Tolerance for rounding errors in a share of a count, so that 0.29 of 100 is 29 and not 28."""


@dataclass(frozen=True, slots=True)
class AdaptiveN:
    """Optimal stopping of best-of-N: draws candidates as long as one more is worth its price.

    Drawing candidates of unknown reward at a price each and keeping the best is Pandora's problem with equal boxes
    (Weitzman 1979; for best-of-N: Kalayci, Raman and Dughmi 2025, arXiv 2510.01394). The optimal rule is to stop as
    soon as the best reward so far reaches the value τ at which one more candidate is worth just its price, that is when

        E[(R − best)⁺] < price

    The distribution of R is not known. The paper models the upper half of exp(reward) as exponential and, after 20
    samples, raises its mean to an upper confidence bound. Here the rewards of a prompt are modelled as normal, with a
    `Prior` on their mean and spread that the rewards so far update (`Predictive`). The less is known, the heavier are
    the tails of `Predictive`, which serves the same purpose as the bound. The savings come from the prior: a few
    rewards alone say so little about the best ones that stopping without a prior saves nothing over plain best-of-N
    (docs/stopping.md shows both).

    With a `quantile` instead of a price it stops when P(R < best) ≥ quantile, that is when the next sample would be
    worse than the best with at least that probability. This rule does not depend on the unit of the reward. A best
    reward of `target_reward` or more always stops it.

    Without a prior, three rewards are drawn before the first decision, and drawing continues while all rewards are
    equal, because their spread is then unknown. Missing rewards (NaN, −∞) count as drawn and carry no information.
    At least `least` and at most `most` candidates are drawn.
    """

    most: int
    least: int = 1
    price: float | None = None
    quantile: float | None = None
    target_reward: float | None = None
    wave: int = WAVE
    prior: Prior = UNKNOWN

    def next_wave(self, rewards_N: Sequence[float]) -> int:
        """How many candidates to draw next, given the rewards of those drawn so far; 0 means stop."""
        drawn = len(rewards_N)
        usable = [reward for reward in rewards_N if reward > -math.inf]  # the comparison drops NaN too
        if drawn >= self.least and self._is_enough(usable):
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
    """Cancels the candidates with the lowest partial rewards at each of several lengths.

    The reward of a partial candidate predicts the reward of the complete one (Sun et al. 2024, arXiv 2410.20290). The
    paper cuts at a quantile of the rewards whenever memory is full. Here the cut happens when every running candidate
    has reached the next of `checkpoints`, in tokens, which does not depend on the machine. Candidates that have ended
    take part in the comparison with their final reward, but cannot be cancelled.
    """

    checkpoints: tuple[int, ...]
    share: float = 0.5
    least: int = 1

    def rejected(self, growing: Mapping[int, float], ended: Sequence[float]) -> list[int]:
        """The indices to cancel among the `growing` candidates (index -> partial reward).

        They are among the lowest ⌊share · m⌋ of all m candidates that have a reward. A candidate whose reward is
        missing (NaN) is neither counted nor cancelled. Among ties the higher index is cancelled first. At least
        `least` candidates remain.
        """
        rewarded = [(reward, -index) for index, reward in growing.items() if not math.isnan(reward)]
        rewarded += [(reward, 1) for reward in ended if not math.isnan(reward)]  # 1: no index, since it has ended
        lowest = sorted(rewarded)[: int(self.share * len(rewarded) + EPSILON)]
        spare = max(0, len(growing) + len(ended) - self.least)
        return [-negated_index for _, negated_index in lowest if negated_index <= 0][:spare]


@dataclass(frozen=True, slots=True)
class StragglerCut:
    """Stops when a `share` of the candidates have ended, or one of them has reached `target_reward`.

    The last candidates to end are the longest, so this favours short answers; docs/stopping.md says so to the user.
    """

    share: float = 1.0
    target_reward: float | None = None
    least: int = 1

    def is_enough(self, ended_rewards: Sequence[float], drawn: int) -> bool:
        """Whether to cancel the rest of the `drawn` candidates; the reward of one not yet scored is NaN."""
        ended = len(ended_rewards)
        if ended < min(self.least, drawn):
            return False
        if ended / drawn >= self.share:
            return True
        return self.target_reward is not None and any(reward >= self.target_reward for reward in ended_rewards)


Policy = Literal["adaptive", "speculative_rejection", "adaptive_rejection", "straggler_cut"]


@dataclass(frozen=True, slots=True)
class Stopping:
    """The stopping policy of one request, made of up to three parts; `policy` is its name, None for plain best-of-N.

    `waves` decides how many candidates are drawn, `rejection` which running ones are cancelled at a checkpoint, and
    `stragglers` when all that still run are cancelled.
    """

    policy: Policy | None = None
    waves: AdaptiveN | None = None
    rejection: SpeculativeRejection | None = None
    stragglers: StragglerCut | None = None

    @property
    def cancels_running(self) -> bool:
        """Whether running candidates may be cancelled."""
        return self.rejection is not None or self.stragglers is not None

    def at_once(self, most: int) -> int:
        """The most candidates that run at the same time, of a request for `most`."""
        return most if self.waves is None else min(most, max(self.waves.wave, self.waves.least))

    @property
    def reads_rewards(self) -> bool:
        """Whether decisions need rewards, so that candidates must be scored before the last one has finished."""
        by_target = self.stragglers is not None and self.stragglers.target_reward is not None
        return self.waves is not None or self.rejection is not None or by_target
