"""Tokens saved by stopping policies on recorded pools, against the mean reward of the winner.

Every policy runs with the code that serves (`reranker.stopping`) over pools of 32 candidates for each prompt, in random
orders. Plain best-of-n is the expectation over all orders (`reranker.estimators`). A cancelled candidate costs the
tokens until it is cancelled.

A policy has settings, and choosing the best setting on the prompts it is measured on would bias the figures. The
prompts are therefore halved: the prior and the cheapest acceptable setting are fitted on one half, the figures are
measured on the other, and then the halves are swapped. Two criteria of acceptable are reported:

    equal     the mean reward is at least plain best-of-16's
    within    the difference to it, prompt by prompt, has a 95 % interval that reaches 0

    python -m benchmarks.stopping [--orders 6]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.provenance import RESULTS, provenance
from benchmarks.stats import write_result
from reranker.estimators import bootstrap_mean, expected_max
from reranker.reward_posterior import UNKNOWN, Prior
from reranker.stopping import WAVE, AdaptiveN, SpeculativeRejection, Stopping
from reranker.stopping_replay import Pool, replay

PLAIN_N = 16
BARS = {"adaptive": 0.70, "speculative_rejection": 0.55}
"""Maximum share of plain best-of-16's tokens, at its mean reward."""
PRICES = tuple(round(0.02 * 2 ** (step / 5), 4) for step in range(16))
"""Prices of a candidate in standard deviations of a prompt's rewards, from a fiftieth to a sixth."""
WAVES = (1, 2, 4, 8)
SHARES = (0.25, 0.5, 0.75)
REJECTING_N = (16, 24, 32)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PolicySetting:
    """A setting of a policy: its values, and a function from the prior, which depends on the prompts, to the policy."""

    values: dict[str, Any]
    stopping: Callable[[Prior], Stopping]
    best_of: int


def tried(pools: Sequence[Pool], setting: PolicySetting, prior: Prior, orders: int) -> Floats:
    """Reward and tokens of each prompt (P, 2): means over the orders, which are the same for every setting."""
    stopping = setting.stopping(prior)
    means = []
    for index, pool in enumerate(pools):
        random = Random(index)
        indices = range(len(pool.rewards_N))
        runs = [
            replay(pool.of(random.sample(indices, setting.best_of)), stopping, setting.best_of) for _ in range(orders)
        ]
        means.append(np.mean(runs, axis=0))
    return np.array(means)


def plain(pools: Sequence[Pool], n: int) -> Floats:
    """Expected reward and tokens of plain best-of-n for each prompt (P, 2)."""
    return np.array([(expected_max(pool.rewards_N, n), n * fmean(pool.tokens_N)) for pool in pools])


def adaptive(prior: Prior, price: float, wave: int, most: int, *, uses_prior: bool = True) -> Stopping:
    """The adaptive policy; `price` is in standard deviations, so that one list of prices fits every reward model."""
    policy_prior = prior if uses_prior else UNKNOWN
    return Stopping("adaptive", waves=AdaptiveN(most, price=price * prior.sd, wave=wave, prior=policy_prior))


def adaptive_settings(most: int, wave: int, *, uses_prior: bool = True) -> list[PolicySetting]:
    return [
        PolicySetting(
            {"price_in_sd": price, "wave": wave},
            partial(adaptive, price=price, wave=wave, most=most, uses_prior=uses_prior),
            most,
        )
        for price in PRICES
    ]


def rejections(lengths: Sequence[int]) -> list[SpeculativeRejection]:
    """Rejection at one length, or at two lengths of which the second is at least twice the first."""
    single = [(length,) for length in lengths]
    double = [(first, second) for first in lengths for second in lengths if second >= 2 * first]
    return [SpeculativeRejection(checkpoints, share) for checkpoints in single + double for share in SHARES]


def rejection_settings(lengths: Sequence[int]) -> list[PolicySetting]:
    def stopping(_: Prior, rejection: SpeculativeRejection) -> Stopping:
        return Stopping("speculative_rejection", rejection=rejection)

    return [
        PolicySetting(
            {"best_of": best_of, "checkpoints": list(rejection.checkpoints), "reject_share": rejection.share},
            partial(stopping, rejection=rejection),
            best_of,
        )
        for best_of, rejection in product(REJECTING_N, rejections(lengths))
    ]


def both_settings(lengths: Sequence[int], most: int) -> list[PolicySetting]:
    def stopping(prior: Prior, price: float, wave: int, rejection: SpeculativeRejection) -> Stopping:
        waves = adaptive(prior, price, wave, most).waves
        return Stopping("adaptive_rejection", waves=waves, rejection=rejection)

    at_one_length = [rejection for rejection in rejections(lengths) if len(rejection.checkpoints) == 1]
    return [
        PolicySetting(
            {
                "price_in_sd": price,
                "wave": wave,
                "checkpoints": list(rejection.checkpoints),
                "reject_share": rejection.share,
            },
            partial(stopping, price=price, wave=wave, rejection=rejection),
            most,
        )
        for price, wave, rejection in product(PRICES[::3], (WAVE, 2 * WAVE), at_one_length)
    ]


def compare(pools: Sequence[Pool], settings: Sequence[PolicySetting], orders: int) -> dict[str, Any]:
    """The policy against plain best-of-16, its setting chosen on the other half of the prompts."""
    halves = (range(0, len(pools), 2), range(1, len(pools), 2))
    goal = plain(pools, PLAIN_N)
    tested: dict[str, dict[int, Floats]] = {"equal": {}, "within": {}}
    chosen: dict[str, list[dict[str, Any]]] = {"equal": [], "within": []}
    curve = np.zeros((len(settings), 2))
    for fit, test in (halves, halves[::-1]):
        prior = Prior.of([pools[prompt].rewards_N for prompt in fit])
        on_fit, on_test = (
            [tried([pools[prompt] for prompt in half], setting, prior, orders) for setting in settings]
            for half in (fit, test)
        )
        curve += [figures_P_2.sum(axis=0) for figures_P_2 in on_test]
        for criterion, best in _cheapest(on_fit, goal[list(fit), 0]).items():
            tested[criterion] |= dict(zip(test, on_test[best], strict=True))
            chosen[criterion].append(settings[best].values)
    return {
        criterion: {
            "chosen": chosen[criterion],
            "reward": fmean(figures_P_2[:, 0]),
            "reward_minus_plain": asdict(bootstrap_mean(list(figures_P_2[:, 0] - goal[:, 0]))),
            "token_share": ratio_with_interval(figures_P_2[:, 1], goal[:, 1]),
        }
        for criterion, by_prompt in tested.items()
        for figures_P_2 in [np.array([by_prompt[prompt] for prompt in range(len(pools))])]
    } | {
        "curve": [
            {**setting.values, "reward": reward, "tokens": tokens}
            for setting, (reward, tokens) in zip(settings, curve / len(pools), strict=True)
        ]
    }


def _cheapest(by_setting: Sequence[Floats], goal_P: Floats) -> dict[str, int]:
    """Criterion -> the acceptable setting with the fewest tokens; the one with the highest reward where none is.

    `by_setting` has reward and tokens of each prompt (P, 2) for every setting.
    """
    rewards, tokens = np.array([figures_P_2.mean(axis=0) for figures_P_2 in by_setting]).T
    upper = np.array(
        [bootstrap_mean(list(figures_P_2[:, 0] - goal_P), resamples=500).high for figures_P_2 in by_setting]
    )
    acceptable = {"equal": rewards >= goal_P.mean(), "within": upper >= 0}
    return {
        criterion: int(np.where(accepted, tokens, np.inf).argmin() if accepted.any() else rewards.argmax())
        for criterion, accepted in acceptable.items()
    }


def frontier(curve: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings that no other beats in both tokens and reward, cheapest first."""
    best: list[dict[str, Any]] = []
    for setting in sorted(curve, key=lambda setting: (setting["tokens"], -setting["reward"])):
        if not best or setting["reward"] > best[-1]["reward"]:
            best.append(setting)
    return best


def ratio_with_interval(above_P: Floats, below_P: Floats, resamples: int = 5000) -> dict[str, float]:
    """The ratio of two means over prompts, and its 95 % bootstrap interval over prompts."""
    generator = np.random.default_rng(0)
    resampled = generator.integers(len(above_P), size=(resamples, len(above_P)))
    low, high = np.quantile(above_P[resampled].mean(axis=1) / below_P[resampled].mean(axis=1), [0.025, 0.975])
    return {"mean": float(above_P.mean() / below_P.mean()), "low": float(low), "high": float(high)}


def plain_curve(pools: Sequence[Pool]) -> dict[str, dict[str, float]]:
    curve = {}
    for n in range(1, len(pools[0].rewards_N) + 1):
        figures_P_2 = plain(pools, n)
        interval = bootstrap_mean(list(figures_P_2[:, 0]), resamples=2000)
        curve[str(n)] = {
            "reward": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "tokens": float(figures_P_2[:, 1].mean()),
        }
    return curve


def film_reviews() -> tuple[list[Pool], tuple[int, ...]]:
    recorded = json.loads((RESULTS / "reward_pools.json").read_text())
    lengths = tuple(recorded["lengths"])
    pools = [
        Pool(sample["rewards"], sample["tokens"], {length: sample["beginnings"][str(length)] for length in lengths})
        for sample in recorded["samples"]
    ]
    return pools, lengths


def arithmetic() -> list[Pool]:
    """Answers to word problems, with the rewards of the model trained on other problems; a candidate costs 1."""
    recorded = json.loads((RESULTS / "arithmetic.json").read_text())
    return [Pool(sample["rewards"]["reward-0"], [1] * recorded["pool"]) for sample in recorded["samples"]]


def measure(orders: int) -> dict[str, Any]:
    reviews, lengths = film_reviews()
    pools = {"film reviews": reviews, "arithmetic": arithmetic()}
    most = len(reviews[0].rewards_N)
    with_prior, without_prior = adaptive_settings(most, WAVE), adaptive_settings(most, WAVE, uses_prior=False)
    settings_by_pools: dict[str, dict[str, list[PolicySetting]]] = {
        "film reviews": {
            "adaptive": with_prior,
            "adaptive without a prior": without_prior,
            "speculative_rejection": rejection_settings(lengths),
            "adaptive_rejection": both_settings(lengths, most),
        },
        "arithmetic": {"adaptive": with_prior, "adaptive without a prior": without_prior},
    }
    return {
        "provenance": provenance(),
        "prompts": {name: len(prompts) for name, prompts in pools.items()},
        "unit": {"film reviews": "tokens", "arithmetic": "candidates"},
        "pool": most,
        "orders": orders,
        "plain_n": PLAIN_N,
        "bars": BARS,
        "prior": {name: asdict(Prior.of([pool.rewards_N for pool in prompts])) for name, prompts in pools.items()},
        "plain": {name: plain_curve(prompts) for name, prompts in pools.items()},
        "policies": {
            name: {policy: compare(pools[name], settings, orders) for policy, settings in by_policy.items()}
            for name, by_policy in settings_by_pools.items()
        },
        "share_by_wave": {
            name: {
                str(wave): compare(prompts, adaptive_settings(most, wave), orders)["equal"]["token_share"]
                for wave in WAVES
            }
            for name, prompts in pools.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=6, help="number of random orders of each pool")
    write_result("stopping", measure(parser.parse_args().orders))


if __name__ == "__main__":
    main()
