"""Finds how many candidates to draw, and which stopping policy to use, from the pools of a run of `nbest batch`.

    plain        best of n, for every n up to the pool's size
    adaptive     draws in waves until one more candidate is not worth its price, at a dozen prices (docs/stopping.md)

Each setting is replayed on every pool. To avoid optimistic figures, each half of the prompts is measured with what was
learnt on the other half: the prior of adaptive stopping, and the choice of the recommended setting.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from reranker.estimators import bootstrap_mean, expected_max
from reranker.reward_posterior import Prior
from reranker.stopping import WAVE, AdaptiveN, Stopping
from reranker.stopping_replay import Pool, replay
from server.offline.errors import OfflineError
from server.offline.records import Result

MIN_PROMPTS = 8
ORDERS = 8
"""Random orders of each pool in which adaptive stopping draws the candidates."""
PRICES_IN_SD = tuple(round(0.01 * 2 ** (step / 2), 4) for step in range(12))
"""Prices in standard deviations of a prompt's rewards, from a hundredth to almost a half."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Target:
    """What the recommended setting must reach; exactly one field is given.

    `quality` is the least share, from 0 to 1, of the reward gain from best of 1 to best of the whole pool. `tokens` is
    the most generated tokens per request, on average.
    """

    quality: float | None = None
    tokens: float | None = None

    def choose(self, tokens_S_P: Floats, reward_S_P: Floats, ends: tuple[int, int]) -> int | None:
        """The index of the best of S settings by their means over P prompts; None if no setting reaches the target.

        With `quality` it is the cheapest setting that reaches it, with `tokens` the affordable one with the highest
        reward. `ends` are the indices of best of 1 and best of the whole pool.
        """
        tokens_S, reward_S = tokens_S_P.mean(axis=1), reward_S_P.mean(axis=1)
        if self.tokens is not None:
            affordable = np.flatnonzero(tokens_S <= self.tokens)
            return int(affordable[reward_S[affordable].argmax()]) if affordable.size else None
        first, last = (reward_S[end] for end in ends)
        sufficient = np.flatnonzero(reward_S >= first + (self.quality or 0.0) * (last - first))
        return int(sufficient[tokens_S[sufficient].argmin()])


@dataclass(frozen=True, slots=True)
class StoppingSetting:
    """Best of `best_of`: plain, or with adaptive stopping at a price in standard deviations."""

    best_of: int
    price_in_sd: float | None = None

    def stopping(self, prior: Prior) -> Stopping:
        if self.price_in_sd is None:
            return Stopping()
        price = self.price_in_sd * prior.sd
        return Stopping("adaptive", waves=AdaptiveN(self.best_of, price=price, wave=WAVE, prior=prior))

    def server_settings(self, prior: Prior) -> dict[str, Any]:
        """The settings of a server that uses this by default."""
        settings: dict[str, Any] = {"default_best_of": self.best_of}
        if self.price_in_sd is not None:
            policy = {"policy": "adaptive", "price": self.price_in_sd * prior.sd, "prior": asdict(prior)}
            settings["default_stopping"] = json.dumps(policy)
        return settings


def pools_of(results: Iterable[Result]) -> list[Pool]:
    """The pools of the largest size in which every candidate has a reward.

    Raises:
        OfflineError: there are fewer than `MIN_PROMPTS`, or they hold one candidate each.
    """
    pools = [
        Pool(result.rewards, [candidate.num_tokens for candidate in result.candidates])
        for result in results
        if result.stopped_by == "all" and len(result.rewards) == len(result.candidates)
    ]
    largest = max((len(pool.rewards_N) for pool in pools), default=0)
    complete = [pool for pool in pools if len(pool.rewards_N) == largest]
    if largest < 2:
        raise OfflineError(
            "A pool of one candidate cannot be calibrated; draw more with nbest batch --best-of 16 or more"
        )
    if len(complete) < MIN_PROMPTS:
        raise OfflineError(
            f"{len(complete)} prompts have all {largest} candidates with a reward, and at least {MIN_PROMPTS} are "
            "needed; give nbest batch more prompts"
        )
    return complete


def calibrate(pools: Sequence[Pool], target: Target) -> dict[str, Any]:
    """The curves of all settings, and the recommended setting with its figures, as written to calibration.json.

    Raises:
        OfflineError: no setting reaches the target.
        ValueError: all rewards of every prompt are the same.
    """
    largest = len(pools[0].rewards_N)
    settings = [StoppingSetting(n) for n in range(1, largest + 1)] + [
        StoppingSetting(largest, price) for price in PRICES_IN_SD
    ]
    ends = (0, largest - 1)
    halves = [list(range(start, len(pools), 2)) for start in (0, 1)]
    priors = [Prior.of([pools[index].rewards_N for index in half]) for half in halves]
    expected_S_P_2 = np.array(
        [
            [_expected(pool, setting, priors[1 - index % 2], seed=index) for index, pool in enumerate(pools)]
            for setting in settings
        ]
    )
    reward_S_P, tokens_S_P = expected_S_P_2[:, :, 0], expected_S_P_2[:, :, 1]
    chosen = target.choose(tokens_S_P, reward_S_P, ends)
    if chosen is None:
        raise OfflineError(
            f"One candidate already takes {tokens_S_P[0].mean():.0f} tokens, more than {target.tokens:g}; allow more"
        )
    chosen_on_half = [target.choose(tokens_S_P[:, half], reward_S_P[:, half], ends) for half in halves]
    indices = np.arange(len(pools))
    chosen_on_other_half = [chosen_on_half[1 - index % 2] for index in indices]
    measured = [chosen if setting is None else setting for setting in chosen_on_other_half]
    rewards_P, tokens_P = reward_S_P[measured, indices], tokens_S_P[measured, indices]
    curve = _curve(settings, reward_S_P, tokens_S_P)
    return {
        "prompts": len(pools),
        "pool": largest,
        "target": {name: value for name, value in asdict(target).items() if value is not None},
        "plain": curve[:largest],
        "adaptive": curve[largest:],
        "recommended": {
            "server": settings[chosen].server_settings(Prior.of([pool.rewards_N for pool in pools])),
            "reward": asdict(bootstrap_mean(list(rewards_P))),
            "reward_minus_best_of_all": asdict(bootstrap_mean(list(rewards_P - reward_S_P[ends[1]]))),
            "tokens": asdict(bootstrap_mean(list(tokens_P))),
            "share_of_all_tokens": float(tokens_P.sum() / tokens_S_P[ends[1]].sum()),
        },
    }


def _expected(pool: Pool, setting: StoppingSetting, prior: Prior, seed: int) -> tuple[float, float]:
    """The expected reward of the winner, and the expected tokens, of the setting on this pool."""
    if setting.price_in_sd is None:
        return expected_max(pool.rewards_N, setting.best_of), setting.best_of * fmean(pool.tokens_N)
    random, stopping = Random(seed), setting.stopping(prior)  # equal seeds: the same orders for every price
    indices = range(len(pool.rewards_N))
    runs = [replay(pool.of(random.sample(indices, len(indices))), stopping, setting.best_of) for _ in range(ORDERS)]
    return fmean(reward for reward, _ in runs), fmean(tokens for _, tokens in runs)


def _curve(settings: Sequence[StoppingSetting], reward_S_P: Floats, tokens_S_P: Floats) -> list[dict[str, Any]]:
    """The mean reward with its interval, and the mean tokens, of each setting."""
    return [
        {**asdict(setting), "reward": asdict(bootstrap_mean(list(rewards_P))), "tokens": float(tokens_P.mean())}
        for setting, rewards_P, tokens_P in zip(settings, reward_S_P, tokens_S_P, strict=True)
    ]


def as_toml(calibration: dict[str, Any], option: str) -> str:
    """The recommended settings as a file for `nbest serve --config`; its first line names the option of the target."""
    best = calibration["recommended"]
    share = 100 * best["share_of_all_tokens"]
    return (
        f"# nbest calibrate {option}: {share:.0f} % of the tokens of best of {calibration['pool']}, and "
        f"{best['reward_minus_best_of_all']['mean']:+.2f} of its reward.\n"
        + "".join(f"{name} = {json.dumps(value)}\n" for name, value in best["server"].items())
    )
