"""The summary of a run: tokens, and the mean reward that best-of-n would have had for every n, from the drawn pools.

At n the mean is over the prompts with at least n rewarded candidates; each contributes the expected maximum over all
subsets of n of them (`reranker.estimators`). Up to `BOOTSTRAP_PROMPTS` prompts the 95 % interval is a bootstrap over
prompts. Beyond that it is mean ± 1.96 s/√P, to which the bootstrap converges and which needs no values in memory. Pools
that a stopping policy shortened are left out, since a policy stops where rewards are high.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from reranker.estimators import bootstrap_mean, expected_max, kl_upper_bound
from reranker.reward_posterior import Prior
from server.offline.records import Result

BOOTSTRAP_PROMPTS = 2000
RESAMPLES = 2000


@dataclass(slots=True)
class RunningMean:
    """The mean of values that are added one by one (Welford 1962); the first values are kept for the bootstrap."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    first: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.count += 1
        difference = value - self.mean
        self.mean += difference / self.count
        self.squares += difference * (value - self.mean)
        if self.count <= BOOTSTRAP_PROMPTS:
            self.first.append(value)

    def interval(self) -> dict[str, Any]:
        """The mean, its 95 % interval and the number of prompts."""
        if self.count <= BOOTSTRAP_PROMPTS:
            interval = bootstrap_mean(self.first, resamples=RESAMPLES)
            return {"mean": interval.mean, "low": interval.low, "high": interval.high, "prompts": self.count}
        half = 1.96 * math.sqrt(self.squares / (self.count - 1) / self.count)
        return {"mean": self.mean, "low": self.mean - half, "high": self.mean + half, "prompts": self.count}


def summarise(results: Iterable[Result]) -> dict[str, Any]:
    """The summary of these results, of which one at a time is held in memory."""
    prompts = prompt_tokens = generated_tokens = scored_tokens = 0
    winners, curve, pools = RunningMean(), list[RunningMean](), list[list[float]]()
    for result in results:
        prompts += 1
        prompt_tokens += result.prompt_tokens
        generated_tokens += result.generated_tokens
        scored_tokens += result.scored_tokens
        if result.winner.reward is not None:
            winners.add(result.winner.reward)
        if result.stopped_by not in ("all", "deadline"):
            continue
        rewards = [reward for reward in result.rewards if math.isfinite(reward)]
        if len(pools) < BOOTSTRAP_PROMPTS:
            pools.append(rewards)
        curve += [RunningMean() for _ in range(len(rewards) - len(curve))]
        for n, mean in zip(range(1, len(rewards) + 1), curve, strict=False):
            mean.add(expected_max(rewards, n))
    return {
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "scored_tokens": scored_tokens,
        "winner_reward": winners.interval() if winners.count else None,
        "reward_prior": _prior(pools),
        "reward_at_n": {
            str(n): {**mean.interval(), "kl_upper_bound": kl_upper_bound(n)} for n, mean in enumerate(curve, start=1)
        },
    }


def _prior(pools: list[list[float]]) -> dict[str, Any] | None:
    """The reward prior of prompts like these, for adaptive stopping (docs/stopping.md); None if it is undefined."""
    try:
        return asdict(Prior.of(pools))
    except ValueError:
        return None
