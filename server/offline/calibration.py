"""How many candidates, and which policy, a target takes: read off the pools that a run of `nbest batch` has drawn.

    plain        best of n, for every n up to the pool's
    adaptive     draws in waves until one more candidate is not worth its price, at a dozen prices (docs/stopping.md)

Each is replayed on every pool. What adaptive stopping knows beforehand comes from the other half of the prompts, and
the figures of what is recommended from choosing on one half and measuring on the other, so that neither flatters.
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

LEAST_PROMPTS = 8
ORDERS = 8
"""Random orders in which adaptive stopping meets each pool."""
PRICES_IN_SD = tuple(round(0.01 * 2 ** (step / 2), 4) for step in range(12))
"""In deviations of a prompt's rewards: from a hundredth to almost a half."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Target:
    """One of: the share of the rise from best of 1 to best of the pool to be reached, or most tokens of a request."""

    quality: float | None = None
    tokens: float | None = None

    def choose(self, cost_S_P: Floats, reward_S_P: Floats, ends: tuple[int, int]) -> int | None:
        """The setting to take by its means over the prompts; None where none reaches the target.

        `ends` are the settings that stand for best of 1 and best of all.
        """
        cost_S, reward_S = cost_S_P.mean(axis=1), reward_S_P.mean(axis=1)
        if self.tokens is not None:
            affordable = np.flatnonzero(cost_S <= self.tokens)
            return int(affordable[reward_S[affordable].argmax()]) if affordable.size else None
        first, last = (reward_S[end] for end in ends)
        good = np.flatnonzero(reward_S >= first + (self.quality or 0.0) * (last - first))
        return int(good[cost_S[good].argmin()])


@dataclass(frozen=True, slots=True)
class StoppingSetting:
    """Plain best of `best_of`, or with a price adaptive stopping within them."""

    best_of: int
    price_in_sd: float | None = None

    def stopping(self, prior: Prior) -> Stopping:
        if self.price_in_sd is None:
            return Stopping()
        price = self.price_in_sd * prior.sd
        return Stopping("adaptive", waves=AdaptiveN(self.best_of, price=price, wave=WAVE, prior=prior))

    def asked(self, prior: Prior) -> dict[str, Any]:
        """The settings of a server that does so by default."""
        found: dict[str, Any] = {"default_best_of": self.best_of}
        if self.price_in_sd is not None:
            policy = {"policy": "adaptive", "price": self.price_in_sd * prior.sd, "prior": asdict(prior)}
            found["default_stopping"] = json.dumps(policy)
        return found


def pools_of(results: Iterable[Result]) -> list[Pool]:
    """The pools that are as large as the largest, with a reward for every candidate.

    Raises:
        OfflineError: they are too few to tell anything, or hold one candidate.
    """
    pools = [
        Pool(result.rewards, [one.num_tokens for one in result.candidates])
        for result in results
        if result.stopped_by == "all" and len(result.rewards) == len(result.candidates)
    ]
    most = max((len(pool.rewards_N) for pool in pools), default=0)
    whole = [pool for pool in pools if len(pool.rewards_N) == most]
    if most < 2:
        raise OfflineError("A pool of one candidate tells nothing; draw some with nbest batch --best-of 16 or more")
    if len(whole) < LEAST_PROMPTS:
        raise OfflineError(
            f"{len(whole)} prompts have all {most} candidates with a reward, and {LEAST_PROMPTS} are needed to tell "
            "anything; give nbest batch more prompts"
        )
    return whole


def calibrate(pools: Sequence[Pool], target: Target) -> dict[str, Any]:
    """The curves of all settings, and what is recommended: its figures and the server's settings.

    Raises:
        OfflineError: no setting reaches the target.
        ValueError: all rewards of every prompt are the same.
    """
    most = len(pools[0].rewards_N)
    settings = [StoppingSetting(n) for n in range(1, most + 1)] + [
        StoppingSetting(most, price) for price in PRICES_IN_SD
    ]
    ends = (0, most - 1)
    halves = [list(range(start, len(pools), 2)) for start in (0, 1)]
    priors = [Prior.of([pools[place].rewards_N for place in half]) for half in halves]
    spent_S_P_2 = np.array(
        [
            [_spent(pool, setting, priors[1 - place % 2], seed=place) for place, pool in enumerate(pools)]
            for setting in settings
        ]
    )
    reward_S_P, tokens_S_P = spent_S_P_2[:, :, 0], spent_S_P_2[:, :, 1]
    chosen = target.choose(tokens_S_P, reward_S_P, ends)
    if chosen is None:
        raise OfflineError(
            f"One candidate takes {tokens_S_P[0].mean():.0f} tokens already, more than {target.tokens:g}; allow more"
        )
    by_half = [target.choose(tokens_S_P[:, half], reward_S_P[:, half], ends) for half in halves]
    other = [chosen if (found := by_half[1 - place % 2]) is None else found for place in range(len(pools))]
    places = np.arange(len(pools))
    rewards_P, tokens_P = reward_S_P[other, places], tokens_S_P[other, places]
    told = _told(settings, reward_S_P, tokens_S_P)
    return {
        "prompts": len(pools),
        "pool": most,
        "target": {name: value for name, value in asdict(target).items() if value is not None},
        "plain": told[:most],
        "adaptive": told[most:],
        "recommended": {
            "server": settings[chosen].asked(Prior.of([pool.rewards_N for pool in pools])),
            "reward": asdict(bootstrap_mean(list(rewards_P))),
            "reward_minus_best_of_all": asdict(bootstrap_mean(list(rewards_P - reward_S_P[ends[1]]))),
            "tokens": asdict(bootstrap_mean(list(tokens_P))),
            "share_of_all_tokens": float(tokens_P.sum() / tokens_S_P[ends[1]].sum()),
        },
    }


def _spent(pool: Pool, setting: StoppingSetting, prior: Prior, seed: int) -> tuple[float, float]:
    """The reward and the tokens that the setting is expected to end with on this pool."""
    if setting.price_in_sd is None:
        return expected_max(pool.rewards_N, setting.best_of), setting.best_of * fmean(pool.tokens_N)
    random, stopping = Random(seed), setting.stopping(prior)  # the same orders for every price
    indices = range(len(pool.rewards_N))
    runs = [replay(pool.of(random.sample(indices, len(indices))), stopping, setting.best_of) for _ in range(ORDERS)]
    return fmean(reward for reward, _ in runs), fmean(tokens for _, tokens in runs)


def _told(settings: Sequence[StoppingSetting], reward_S_P: Floats, tokens_S_P: Floats) -> list[dict[str, Any]]:
    return [
        {**asdict(setting), "reward": asdict(bootstrap_mean(list(rewards_P))), "tokens": float(tokens_P.mean())}
        for setting, rewards_P, tokens_P in zip(settings, reward_S_P, tokens_S_P, strict=True)
    ]


def as_toml(found: dict[str, Any], target: str) -> str:
    """The recommended settings as a file for `nbest serve --config`."""
    best = found["recommended"]
    share = 100 * best["share_of_all_tokens"]
    return (
        f"# nbest calibrate {target}: {share:.0f} % of the tokens of best of {found['pool']}, and "
        f"{best['reward_minus_best_of_all']['mean']:+.2f} of its reward.\n"
        + "".join(f"{name} = {json.dumps(value)}\n" for name, value in best["server"].items())
    )
