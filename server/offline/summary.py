"""What a run has given: tokens, and the mean reward that best-of-n would have had at every n, from the pools it drew.

At n the mean is over the prompts that have at least n rewarded candidates, each with the expectation over all ways to
draw n of them (`reranker.estimators`). Its 95 % interval is the bootstrap's over prompts up to `BOOTSTRAP_PROMPTS` of
them; where there are more, mean ± 1.96 s/√P, which the bootstrap comes to and which needs no prompt to be kept. Pools
that a stopping policy has cut short are left out, since it stops where rewards are high.
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
class Mean:
    """A mean that is found on the way (Welford 1962); the first values are kept for the bootstrap."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    first: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.count += 1
        away = value - self.mean
        self.mean += away / self.count
        self.squares += away * (value - self.mean)
        if self.count <= BOOTSTRAP_PROMPTS:
            self.first.append(value)

    def told(self) -> dict[str, Any]:
        if self.count <= BOOTSTRAP_PROMPTS:
            interval = bootstrap_mean(self.first, resamples=RESAMPLES)
            return {"mean": interval.mean, "low": interval.low, "high": interval.high, "prompts": self.count}
        half = 1.96 * math.sqrt(self.squares / (self.count - 1) / self.count)
        return {"mean": self.mean, "low": self.mean - half, "high": self.mean + half, "prompts": self.count}


def summarise(results: Iterable[Result]) -> dict[str, Any]:
    """The summary of these results; one is held at a time."""
    prompts = prompt_tokens = generated_tokens = scored_tokens = 0
    winners, curve, pools = Mean(), list[Mean](), list[list[float]]()
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
        curve += [Mean() for _ in range(len(rewards) - len(curve))]
        for n, mean in zip(range(1, len(rewards) + 1), curve, strict=False):
            mean.add(expected_max(rewards, n))
    return {
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "scored_tokens": scored_tokens,
        "winner_reward": winners.told() if winners.count else None,
        "reward_prior": _prior(pools),
        "reward_at_n": {
            str(n): {**mean.told(), "kl_upper_bound": kl_upper_bound(n)} for n, mean in enumerate(curve, start=1)
        },
    }


def _prior(pools: list[list[float]]) -> dict[str, Any] | None:
    """What adaptive stopping is told beforehand about prompts like these (docs/stopping.md)."""
    try:
        return asdict(Prior.of(pools))
    except ValueError:
        return None
